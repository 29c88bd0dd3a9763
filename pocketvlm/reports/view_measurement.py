"""The page's content about a measurement: workload, bundles, memory and plausibility."""

from __future__ import annotations

from collections.abc import Mapping

from pocketvlm.reports.charts import Bar, draw_bars
from pocketvlm.reports.formatting import format_bytes, format_number, text_of
from pocketvlm.reports.measurement import MeasuredBundle, Measurement, Memory

__all__ = [
    "describe_memory",
    "describe_workload",
    "view_bundle",
    "view_memory",
    "view_plausibility",
]


def describe_workload(bench: Measurement) -> str:
    """The workload in two sentences."""
    workload = bench.workload
    if workload is None:
        return ""
    prompts = [arm.prompt for arm in bench.compared.values() if arm.prompt is not None]
    visual = f"({text_of(prompts[0].visual_tokens if prompts else None)} visual tokens) + "
    picture = ""
    if workload.image_size:
        size = f"{workload.image_size}×{workload.image_size}"
        many = "one" if workload.pictures in (None, 1) else f"{workload.pictures}"
        picture = f"{many} {size} picture{'' if many == 'one' else 's'} {visual}"
    elif workload.image_files:
        picture = f"{', '.join(workload.image_files)} {visual}"
    turns = f", in each of {workload.turns} turns" if (workload.turns or 1) > 1 else ""
    end = "end tokens ignored" if workload.ignore_eos else "stops at the end token"
    return (
        f"Workload “{workload.name}”: {picture}{workload.prompt_tokens} text tokens, "
        f"{workload.new_tokens} generated ({end}){turns}. Bundles take turns, each in "
        f"{workload.repeats} fresh processes that answer {workload.warm_ups} + "
        f"{workload.answers} times: warm-up, then measured."
    )


def view_bundle(bundle: MeasuredBundle) -> tuple[tuple[str, str], ...]:
    """How one bundle of a comparison is stored."""
    return (
        *bundle.precision.items(),
        ("KV cache", text_of(bundle.kv_dtype)),
        (
            "visual tokens",
            f"{text_of(bundle.visual_tokens)} of {text_of(bundle.visual_tokens_full)}",
        ),
        ("on disk", format_bytes(bundle.stored_bytes)),
    )


def view_memory(bench: Measurement, memory: Memory) -> tuple[Bar, ...]:
    """Resident memory in steps, one bar per arm; the run's own if there are no arms."""
    rows: list[tuple[str, Mapping[str, float]]] = []
    measured = {name: arm.memory for name, arm in bench.arms.items()} or {"bundle": memory}
    for role, of_role in measured.items():
        if of_role.peak_rss_bytes is None:
            continue
        before, after = of_role.before_load_rss_bytes, of_role.after_load_rss_bytes
        peak = of_role.peak_rss_bytes
        if before is None or after is None:
            rows.append((role, {"peak": peak}))
            continue
        # The peak may occur while loading, and be above the resident set after it.
        steps = {
            "empty process": before,
            "loaded bundle": max(after - before, 0),
            "while answering": max(peak - max(after, before), 0),
        }
        rows.append((role, steps))
    return draw_bars(rows)


def describe_memory(memory: Memory) -> str:
    """The caption of the memory bars."""
    text = "Resident set of a process that runs one bundle alone; the worst of its repeats."
    if memory.compress_peak_rss_bytes is not None:
        peak = format_bytes(memory.compress_peak_rss_bytes)
        text += f" Making the bundle took {peak} at its peak."
    return text


def view_plausibility(bench: Measurement) -> tuple[tuple[str, str, str, str, str, str], ...]:
    """The plausibility checks as rows of a table."""
    return tuple(
        (
            name,
            text_of(check.check),
            "–" if check.value is None else format_number(check.value),
            "–" if check.bound is None else format_number(check.bound),
            text_of(check.verdict),
            check.detail,
        )
        for name, arm in bench.arms.items()
        for check in arm.plausibility
    )
