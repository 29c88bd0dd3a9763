"""The page is safe, self-contained, deterministic, and never invents a figure."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pocketvlm.cli.app import run_command
from pocketvlm.json_io import DecodeError
from pocketvlm.machine import REPORT_SCHEMA
from pocketvlm.reports import html
from pocketvlm.reports.by_device import file_stem
from pocketvlm.reports.formatting import (
    facts_of,
    format_bytes,
    format_measured,
    format_number,
)
from pocketvlm.reports.report_file import parse_report
from tests.reports.documents import HOSTILE, arm, poison, run_report, several

VOID = {"meta", "br", "hr", "img", "input", "link"}


@pytest.fixture
def report():
    return run_report()


def render_html(*documents):
    return html.render_html(*map(parse_report, documents))


def render_card(document):
    return html.render_card(parse_report(document))


def render_markdown(*documents):
    return html.render_markdown(*map(parse_report, documents))


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
        "float32",
        "int4 g32",
        "2× as fast as the baseline",
        "ended by SIGKILL",
        "41.5",
        "75.0 %",
        "RAPL package-0",
        "int4, turn 2",
        "int4 ttft_user_ms 66.0 71.4 0.92",
        "pocketvlm compress reference:pocket-smol --out out",
        "pocketvlm bench BUNDLE --workload vlm",
        "70 MB",
    ):
        assert expected in words, expected


def test_every_sample_is_a_dot(report):
    text = render_html(report)
    charts = 7  # figures that have a chart
    assert text.count('class="dot fill-arm"') == charts * 5
    assert text.count('class="dot fill-reference"') == charts * 5


def test_what_was_not_measured_is_not_invented():
    words = Page(render_html({})).words
    for what in ("Size by part", "Quality of answers", "Latency", "Peak memory", "Environment"):
        assert f"{what}: not measured." in words
    assert words.count("not measured") >= 10
    assert not re.search(r"\d+(\.\d+)? (ms|MB|%|tokens/s)", words)
    assert "not measured" in render_card({})


def test_a_failed_arm_stays_with_its_reason(report):
    report["bench"]["arms"]["int4"]["latency"] = {"failed": "the worker was ended by SIGKILL"}
    words = Page(render_html(report)).words
    assert "int4 failed: the worker was ended by SIGKILL" in words
    assert "int4 onnx failed failed failed" in words
    many = Page(render_html(*several(report))).words
    assert "the worker was ended by SIGKILL" in many
    assert "failed" in render_markdown(*several(report))


def test_hostile_text_stays_text(report):
    def poison(value):
        if isinstance(value, dict):
            return {key: poison(item) for key, item in value.items()}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return HOSTILE if isinstance(value, str) else value

    poisoned = poison(report)
    poisoned["size"]["weight_bytes"][HOSTILE] = 7
    poisoned["bench"]["arms"][HOSTILE] = poisoned["bench"]["arms"].pop("int4")
    poisoned["bench"]["arms"][HOSTILE]["bundle"]["precision"][HOSTILE] = HOSTILE
    for page in (Page(render_html(poisoned)), Page(render_html(*several(poisoned)))):
        assert "script" not in page.tags
        assert "img" not in page.tags
        assert not any(name.startswith("on") for _, name, _ in page.attributes)
        assert page.open == []
    card = render_card({**report, "notes": ["| <b>x</b> | `y`\n# z"]})
    assert "\n# z" not in card
    assert "<b>" not in card


def test_the_same_report_gives_the_same_bytes(report):
    again = copy.deepcopy(report)
    assert render_html(report) == render_html(again)
    assert render_card(report) == render_card(again)
    assert report == again  # which was not changed


def test_several_reports_are_joined_by_bundle_and_kept_apart_by_device(report):
    page = Page(render_html(*several(report)))
    assert "2 bundles, 1 model, 2 devices" in page.words
    for expected in (
        "1. pocket-smol int4-balanced",
        "2. pocket-smol float",
        "a processor: vlm: 32 tokens, 1 picture of 512 px, 128 generated",
        "pixel-8: vlm",
        "Quality against size",
        "Quality against time to first token, a processor",
        "Quality against time per token, pixel-8",
        "Pareto front",
        "only the arms of one run were interleaved".capitalize(),
    ):
        assert expected in page.words, expected
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for _, name, value in page.attributes if name == "href"}
    assert targets <= set(ids)
    summary = render_markdown(*several(report))
    assert "| 1\\. pocket-smol int4-balanced | onnx |" in summary


def test_a_page_for_each_device_has_its_measurements_alone(report, tmp_path):
    files = []
    for number, document in enumerate(several(report)):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(document))
    out = tmp_path / "all.html"
    run_command(["report", *map(str, files), "--out", str(out), "--per-device"])
    here = Page((tmp_path / "all-a-processor.html").read_text()).words
    there = Page((tmp_path / "all-pixel-8.html").read_text()).words
    assert "2 bundles, 1 model, 1 device" in here
    assert "2 bundles, 1 model, 1 device" in there
    assert "Quality against time per token, pixel-8" in there
    assert "pixel-8" not in here
    assert "a processor" not in there.replace("measured on a processor", "")
    assert file_stem("../Über <b>\n") == "ber-b"
    assert file_stem("///") == "device"


def test_a_bench_result_alone_is_a_page_too(report):
    alone = Page(render_html({"schema": REPORT_SCHEMA, "bench": report["bench"]}))
    assert "2 bundles" in alone.words
    assert "Quality against size: not measured." in alone.words
    one = {**report["bench"], "arms": {"int4": arm()}, "reference": "int4"}
    assert "Quality of answers: not measured." in Page(render_html({"bench": one})).words
    for render in (html.render_html, html.render_markdown):
        with pytest.raises(ValueError, match="at least one report"):
            render()


def test_a_figure_that_failed_its_check_is_not_shown(report):
    check = {"check": "c", "figures": ["decode_tok_s"], "verdict": "fail", "value": 9, "bound": 1}
    report["bench"]["arms"]["int4"]["plausibility"] = [check]
    words = Page(render_html(report)).words
    assert "Decode implausible" in words
    assert "1 implausible figures" in words


def test_text_of_megabytes_is_cut_short(report):
    report["model"]["name"] = "x" * 10_000_000
    report["bench"]["arms"]["y" * 10_000_000] = report["bench"]["arms"].pop("int4")
    page = render_html(report)
    assert "(10,000,000 characters)" in page
    assert len(page) < 1_000_000
    assert len(render_card(report)) < 1_000_000


def test_numbers_never_round_a_miss_away():
    assert format_number(0.99994) == "0.99994"
    assert format_number(1.0) == "1"
    assert format_number(12345.6) == "12,346"
    assert format_number(0.00001234) == "1.23e-05"
    assert format_number(None) == "not measured"


def test_figures_keep_three_digits_so_that_columns_stay_aligned():
    shown = [format_measured(value) for value in (18.123, 11.0, 5.0, 0.96, 113.4, 1234.5)]
    assert shown == ["18.1", "11.0", "5.00", "0.960", "113", "1,234"]
    assert [format_measured(value) for value in (0.0, None, 999.7)] == ["0", "not measured", "1000"]
    sizes = (39_000_000, 6_950_000, 999_900_000, 512)
    assert [format_bytes(value) for value in sizes] == [
        "39 MB",
        "6.95 MB",
        "1000 MB",
        "512 bytes",
    ]


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
    html.render_card(read)
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


def test_no_text_of_a_report_becomes_markup_of_the_card(report):
    from markdown_it import MarkdownIt

    poisoned = poison(report, CARD)
    poisoned["command"] = "pocketvlm ask x\n```\n<script>"
    card = render_card(poisoned)
    plain = render_card(report)
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
