"""The page is safe, self-contained, deterministic, and never invents a figure."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pocketvlm.device_bench.summary import paired_ratios, summarise_blocks
from pocketvlm.json_io import DecodeError, encode
from pocketvlm.reports import html
from pocketvlm.reports.formatting import facts_of, format_number
from pocketvlm.reports.report_file import parse_report

VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = '</style></title><script>alert("x")</script><img src=x onerror=alert(1)>&\'"'


def render_html(*documents):
    return html.render_html(*map(parse_report, documents))


def render_markdown(document):
    return html.render_markdown(parse_report(document))


class Page(HTMLParser):
    """Collects tags and attributes, and checks that elements nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture
def report(block):
    candidate = {index: block(1 + index / 100) for index in range(5)}
    baseline = {index: block(2 + index / 50) for index in range(5)}
    score = {"accuracy": 0.91, "interval_low": 0.89, "interval_high": 0.93}
    return {
        "schema": 2,
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
        "latency": {"onnx": encode(summarise_blocks(list(candidate.values())))},
        "memory": {**encode(candidate[0].memory), "compress_peak_rss_bytes": 900_000_000},
        "environment": {"processor": "a processor", "threads": 2, "ram_bytes": 8_000_000_000},
        "bench": {
            "reference": "baseline",
            "arms": {
                "baseline": {
                    "runtime": "onnx",
                    "bundle": {"precision": {"decoder": "float32"}, "stored_bytes": 12_000_000},
                    "latency": encode(summarise_blocks(list(baseline.values()))),
                    "memory": encode(baseline[0].memory),
                    "stability": {"is_stable": False},
                },
                "candidate": {
                    "runtime": "onnx",
                    "bundle": {"precision": {"decoder": "int4 g32"}, "stored_bytes": 2_000_000},
                    "latency": encode(summarise_blocks(list(candidate.values()))),
                    "memory": encode(candidate[0].memory),
                    "ratios": {
                        name: sorted(values)[len(values) // 2]
                        for name, values in paired_ratios(candidate, baseline).items()
                    },
                    "plausibility": [{"check": "a check", "verdict": "pass"}],
                },
            },
            "order": [{"arm": name} for _ in range(5) for name in ("baseline", "candidate")],
            "workload": {
                "name": "vlm",
                "image_size": 512,
                "prompt_tokens": 32,
                "new_tokens": 128,
            },
        },
        "notes": ["noisy run: repeat it"],
        "failures": ["parity of onnx: vision.cosine is 0.5, at least 0.97 is required"],
    }


def test_the_page_needs_nothing_but_itself(report):
    text = render_html(report)
    page = Page(text)
    assert not {"script", "link", "iframe", "img", "object", "embed", "base"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("src", "srcset", "xlink:href", "action"), (tag, name)
        if name == "href":
            assert value.startswith("#"), value
    assert not re.search(r"https?:|url\(|@import|//[a-z]", text)
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert page.open == []


def test_every_figure_has_its_place(report):
    words = Page(render_html(report)).words
    for expected in (
        "pocket-smol",
        "2 MB",
        "33.3 % of the source's 6 MB",
        "91 . 0 %".replace(" . ", "."),
        "blind floor 34.0 %",
        "n = 2,000",
        "source FAILED",
        "one turn: prompt_ids_equal",
        "token 0 of 9 is 1 ('<s>') in stock",
        "parity FAILED",
        "vision.cosine",
        "≥ 0.97",
        "coreml was not verified: needs a Mac",
        "noisy run: repeat it",
        "gptq: q_proj: damping was raised to 0.02",
        "gptq: 1 layer stays float: no rule",
        "baseline, float32",
        "candidate, int4 g32",
        "2× as fast as the baseline",
        "pocketvlm compress reference:pocket-smol --out out",
        "pocketvlm bench BUNDLE --workload vlm",
        "70 MB",
    ):
        assert expected in words, expected


def test_every_sample_is_a_dot(report):
    text = render_html(report)
    charts = 7  # figures that have a chart
    assert text.count('class="dot fill-candidate"') == charts * 5
    assert text.count('class="dot fill-baseline"') == charts * 5


def test_what_was_not_measured_is_not_invented():
    words = Page(render_html({})).words
    for what in ("Size by part", "Quality of answers", "Latency", "Peak memory", "Environment"):
        assert f"{what}: not measured." in words
    assert words.count("not measured") >= 10
    assert not re.search(r"\d+(\.\d+)? (ms|MB|%|tokens/s)", words)
    assert "not measured" in render_markdown({})


def test_a_failed_target_shows_its_reason(report):
    report["bench"]["arms"]["candidate"]["latency"] = {"failed": "the worker was ended by SIGKILL"}
    words = Page(render_html(report)).words
    assert "Failed: candidate: the worker was ended by SIGKILL" in words


def test_hostile_text_stays_text(report):
    def poison(value):
        if isinstance(value, dict):
            return {key: poison(item) for key, item in value.items()}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return HOSTILE if isinstance(value, str) else value

    poisoned = poison(report)
    poisoned["size"]["weight_bytes"][HOSTILE] = 7
    poisoned["bench"]["arms"]["candidate"]["bundle"]["precision"][HOSTILE] = HOSTILE
    poisoned["bench"]["arms"][HOSTILE] = poisoned["bench"]["arms"]["candidate"]
    page = Page(render_html(poisoned))
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert page.open == []
    card = render_markdown({**report, "notes": ["| <b>x</b> | `y`\n# z"]})
    assert "\n# z" not in card
    assert "<b>" not in card


def test_the_same_report_gives_the_same_bytes(report):
    again = copy.deepcopy(report)
    assert render_html(report) == render_html(again)
    assert render_markdown(report) == render_markdown(again)
    assert report == again  # which was not changed


def test_a_bench_result_alone_and_several_reports_are_pages_too(report):
    alone = Page(render_html({"bench": report["bench"]})).words
    assert "Quality of answers: not measured." in alone
    nested = {key: report[key] for key in ("model", "bench", "latency")}
    assert "baseline, float32" in Page(render_html(nested)).words
    both = Page(render_html(report, nested))
    assert "Side by side" in both.words
    ids = [value for _, name, value in both.attributes if name == "id"]
    assert len(ids) == len(set(ids)) == 2
    with pytest.raises(ValueError, match="at least one report"):
        render_html()


def test_numbers_never_round_a_miss_away():
    assert format_number(0.99994) == "0.99994"
    assert format_number(1.0) == "1"
    assert format_number(12345.6) == "12,346"
    assert format_number(0.00001234) == "1.23e-05"
    assert format_number(None) == "not measured"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_block_is_refused_or_never_breaks_the_page(report, data):
    """Reports are files: any block may have been edited into anything."""
    damaged = copy.deepcopy(report)
    block = data.draw(st.sampled_from(sorted(damaged)))
    target = damaged
    if isinstance(damaged[block], dict) and damaged[block] and data.draw(st.booleans()):
        target, block = damaged[block], data.draw(st.sampled_from(sorted(damaged[block])))
    target[block] = data.draw(JSON)
    try:
        read = parse_report(damaged)
    except DecodeError:
        return
    assert Page(html.render_html(read)).open == []
    html.render_markdown(read)


def test_large_blocks_are_counted_and_small_ones_shown():
    layers = {f"layer.{number}": {"bits=4": {"loss": 1e-5, "bytes": 64}} for number in range(80)}
    facts = dict(
        facts_of(
            {
                "sensitivity": {"tokens": 51, "layers": layers},
                "calibration": {"samples": 128, "seed": None},
                "nothing": None,
            }
        )
    )
    assert facts["sensitivity"] == "tokens 51, 80 layers, see report.json"
    assert facts["calibration"] == "samples 128"
    assert facts["nothing"] == "–"


CARD = (
    "|x|`y`*z*_w_ <script>alert(1)</script> [a](http://evil) ![i](http://evil/i.png) "
    "https://evil.example www.evil.example &lt; @user #1 $m$ ~~s~~\n---\n# h\n```\n<b>\x1b[2J\u202e"
)


def poison(value, text):
    """The report with the text in place of every text, and after every name."""
    if isinstance(value, dict):
        return {key: poison(item, text) for key, item in value.items()}
    if isinstance(value, list):
        return [poison(item, text) for item in value]
    return text if isinstance(value, str) and value not in {"pass", "fail"} else value


def test_no_text_of_a_report_becomes_markup_of_the_card(report):
    from markdown_it import MarkdownIt

    poisoned = poison(report, CARD)
    poisoned["command"] = "pocketvlm ask x\n```\n<script>"
    card = render_markdown(poisoned)
    plain = render_markdown(report)
    assert "\x1b" not in card
    assert "\u202e" not in card
    assert card.startswith("# ")

    def kinds(text):
        tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
        inline = [child for token in tokens for child in token.children or ()]
        return {token.type for token in (*tokens, *inline)}

    forbidden = {"html_block", "html_inline", "link_open", "image", "strong_open", "hr"}
    assert not kinds(card) & forbidden
    assert kinds(card) <= kinds(plain)
    # Nor links, mentions, formulas or strikethrough of GitHub's dialect.
    for mark in ("https://", " www.", " @user", " #1", " $m$", "~~s"):
        assert mark not in card, mark


def test_no_text_of_a_report_steers_the_page(report):
    page = render_html(poison(report, CARD + HOSTILE))
    tags = set(Page(page).tags)
    assert not tags & {"script", "img", "iframe", "object", "form"}
    assert tags == set(Page(render_html(report)).tags)
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "\\x1b[2J\\u202e" in page
