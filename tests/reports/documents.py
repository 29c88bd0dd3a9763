"""Reports as documents, with every block that the page shows."""

from __future__ import annotations

import copy

from pocketvlm.machine import REPORT_SCHEMA

__all__ = ["HOSTILE", "arm", "poison", "run_report", "several"]

HOSTILE = '</style></title><script>alert("x")</script><img src=x onerror=alert(1)>&\'"'


def figure(value):
    samples = [value * (1 + part / 100) for part in range(5)]
    return {
        "samples": samples,
        "median": samples[2],
        "p90": samples[4],
        "p95": samples[4],
        "by_repeat": samples,
    }


def arm(scale=1.0, **more):
    figures = {
        **dict.fromkeys(("ttft_user_ms", "cold_ttft_user_ms", "load_ms"), 70.0 * scale),
        **dict.fromkeys(("ttft_engine_ms", "prefill_ms", "vision_ms"), 30.0 * scale),
        **dict.fromkeys(("decode_tok_s", "prefill_tok_s"), 300.0 / scale),
    }
    return {
        "runtime": "onnx",
        "bundle": {"precision": {"decoder": "int4 g32"}, "stored_bytes": 2_000_000},
        "latency": {name: figure(value) for name, value in figures.items()},
        "memory": {
            "counter": "VmHWM",
            "before_load_rss_bytes": 50_000_000,
            "after_load_rss_bytes": 60_000_000,
            "peak_rss_bytes": 70_000_000,
        },
        **more,
    }


def bench():
    """Two arms with everything that an arm may have, and what became of it."""
    rates = {"samples": [400.0, 380.0, 300.0], "burst": 400.0, "last": 300.0, "retained": 0.75}
    sustained = {"duration_s": 60.0, "answers": 3, "at_s": [1.0, 30.0, 60.0], "decode_tok_s": rates}
    samples = [{"at_s": 0.0, "temperature_c": 30.0}, {"at_s": 60.0, "temperature_c": 41.5}]
    check = {"check": "a check", "verdict": "pass", "value": 1.0, "bound": 2.0, "detail": "why"}
    return {
        "reference": "float",
        "arms": {
            "float": arm(2.0, bundle={"precision": {"decoder": "float32"}}),
            "int4": arm(
                ratios={"ttft_user_ms": 0.5, "decode_tok_s": 2.0},
                later_turns=[{"ttft_user_ms": figure(35.0)}],
                predicted=[
                    {"name": "ttft_user_ms", "predicted": 66.0, "measured": 71.4, "ratio": 0.92}
                ],
                stability={"is_stable": False},
                plausibility=[check],
                failures=[{"repeat": 1, "answers": 2, "reason": "ended by SIGKILL"}],
                sustained=sustained,
                sensors={"before_c": 30.0, "peak_c": 41.5, "samples": samples},
                energy={"counter": "RAPL package-0", "mj_per_token": 12.5},
            ),
        },
        "workload": {"name": "vlm", "image_size": 512, "prompt_tokens": 32, "new_tokens": 128},
        "environment": {"processor": "a processor", "threads": 2, "ram_bytes": 8_000_000_000},
    }


def run_report():
    """A run with every block that a run may have."""
    score = {"accuracy": 0.91, "interval_low": 0.89, "interval_high": 0.93}
    return {
        "schema": REPORT_SCHEMA,
        "command": "pocketvlm compress reference:pocket-smol --out out",
        "model": {"name": "pocket-smol", "visual_tokens": 32},
        "recipe": {"name": "int4-balanced", "description": "four bits", "sha256": "ab"},
        "calibration": {"name": "reference:0", "samples": 128},
        "stages": [
            {
                "method": "gptq",
                "parameters": {"damping": 0.01},
                "metrics": {"layers": 2},
                "notes": ["q_proj: damping was raised to 0.02"],
                "layers": [
                    {"name": "q_proj", "bits": 4, "stored_bytes": 12000, "reason": ""},
                    {"name": "head", "bits": None, "stored_bytes": 500, "reason": "no rule"},
                ],
                "seconds": 12.5,
                "peak_rss_bytes": 900_000_000,
            }
        ],
        "size": {
            "source_bytes": 6_000_000,
            "bundle_bytes": 2_000_000,
            "weight_bytes": {"tower": 500_000, "decoder": 1_200_000},
        },
        "quality": {
            "metric": "exact_match",
            "n": 2000,
            "float": {**score, "accuracy": 0.92, "per_kind": {"count": score}},
            "compressed": {**score, "per_kind": {"count": score}},
            "recovery": 0.989,
            "blind": 0.34,
        },
        "source_check": {
            "verdict": "failed",
            "reason": None,
            "stock": {"transformers": "5.24.0", "processor": "LlavaProcessor"},
            "checks": [
                {
                    "sample": "one turn",
                    "metric": "prompt_ids_equal",
                    "value": 0.0,
                    "bound": {"at_least": 1.0, "at_most": None},
                    "passed": False,
                    "difference": "token 0 of 9 is 1 ('<s>') in stock, 32 ('a') here",
                }
            ],
        },
        "parity": {
            "passed": False,
            "targets": {
                "onnx": {
                    "passed": False,
                    "precision": "integer",
                    "samples": 8,
                    "checks": [
                        {
                            "metric": "vision.cosine",
                            "value": 0.5,
                            "bound": {"at_least": 0.97, "at_most": None},
                            "passed": False,
                        }
                    ],
                    "details": {"near_ties": 1},
                }
            },
            "unverified": {"coreml": "needs a Mac"},
        },
        "bench": bench(),
        "memory": {"compress_peak_rss_bytes": 900_000_000},
        "notes": ["noisy run: repeat it"],
        "failures": ["parity of onnx: vision.cosine is 0.5, at least 0.97 is required"],
    }


def several(report):
    """A run and another of the same model, and a benchmark of both on a second device."""
    digests = {"float": "a" * 64, "int4": "b" * 64}
    elsewhere = copy.deepcopy(report["bench"])
    elsewhere["environment"] = {"processor": "another", "device": "pixel-8"}
    for name, measured in elsewhere["arms"].items():
        measured["bundle"] = {**measured["bundle"], "manifest_sha256": digests.get(name)}
    needs = {"runtimes": {"onnx": {}}}
    list(report["bench"]["arms"].values())[-1]["bundle"]["manifest_sha256"] = digests["int4"]
    first = {**report, **needs, "bundle": {"manifest_sha256": "b" * 64}}
    plain = {"name": "float", "sha256": "cd"}
    second = {
        **{key: value for key, value in report.items() if key != "bench"},
        **needs,
        "recipe": plain,
        "bundle": {"manifest_sha256": "a" * 64},
    }
    return first, second, {"schema": REPORT_SCHEMA, "bench": elsewhere}


def poison(value, text):
    """The report with the text in place of every text, and after every name."""
    if isinstance(value, dict):
        return {key: poison(item, text) for key, item in value.items()}
    if isinstance(value, list):
        return [poison(item, text) for item in value]
    return text if isinstance(value, str) and value not in {"pass", "fail"} else value
