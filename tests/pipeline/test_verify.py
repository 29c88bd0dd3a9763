"""verify: a bundle's runtime again, on this host and on emulated ARM64."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pocketvlm.bundle import Bundle, sign_bundle
from pocketvlm.calibration.source import CalibrationSet, Sample
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.cli.app import run_command
from pocketvlm.cli.failures import run_to_exit_code
from pocketvlm.compress.quantization.affine.rtn import RoundToNearest
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.tokens import ReduceTokens
from pocketvlm.context import RunContext
from pocketvlm.emulation.arm64.emulator import Emulator
from pocketvlm.emulation.arm64.environment import Environment, find_environment
from pocketvlm.emulation.arm64.prepare import prepare_environment
from pocketvlm.errors import (
    BundleError,
    CheckFailedError,
    InputError,
    MissingExtraError,
    UnsupportedError,
)
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.pipeline import verify as verification
from pocketvlm.pipeline.assemble import build_bundle
from pocketvlm.pipeline.recorders import Place
from pocketvlm.pipeline.verify import verify_bundle
from pocketvlm.recipes.load import load_recipe
from tests.forked import fork_cli
from tests.programs import IS_CI, give_up

CTX = RunContext(threads=1)


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize((96, 80), Image.Resampling.NEAREST)


SAMPLES = CalibrationSet(
    name="squares",
    samples=tuple(
        Sample(image=picture(seed), question=question, answer="yes", kind="any")
        for seed, question in enumerate(("what is it?", "is it red?"))
    ),
)
OTHERS = CalibrationSet(
    name="others", samples=(Sample(image=picture(9), question="where?", answer="there"),)
)
TEXT = CalibrationSet(name="text", samples=(Sample(question="who?", answer="nobody"),))


@pytest.fixture(scope="module")
def made(tiny_paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = Checkpoint.load(tiny_paths["llava"])
    checkpoint = ReduceTokens(keep=0.5).apply(checkpoint, SAMPLES, CTX)
    stage = RoundToNearest(rules=(WeightRule(bits=4, group_size=32),))
    checkpoint = stage.apply(checkpoint, SAMPLES, CTX)
    folder = tmp_path_factory.mktemp('it\'s a "run"') / "bundle"
    build_bundle(checkpoint, load_recipe("float"), (ToOnnx(),), folder, SAMPLES.samples, CTX)
    return folder


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(Path(shutil.copytree(made, tmp_path / "bundle")))


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    """The environment of this user; where a machine has none, CI builds it."""
    try:
        if IS_CI:
            return Emulator(environment=prepare_environment(CTX))
        return Emulator(environment=find_environment())
    except (MissingExtraError, UnsupportedError) as error:
        give_up(str(error))


def change_parity(bundle: Bundle, change: Callable[[dict], None]) -> Bundle:
    parity = bundle.path / "parity.json"
    document = json.loads(parity.read_text())
    change(document["targets"]["onnx"]["details"])
    parity.write_text(json.dumps(document))
    sign_bundle(bundle.path, bundle.manifest)
    return Bundle.open(bundle.path)


def test_this_host_gives_the_tokens_of_the_certificate(made: Path) -> None:
    found = verify_bundle(Bundle.open(made), SAMPLES, CTX)
    (target,) = found.found.targets
    assert target.passed
    assert {check.metric for check in target.checks} == {
        "greedy.mismatch_share",
        "image_swap.reference_change",
        "two_turns.sqnr_db",
    }
    assert found.certified is not None
    assert found.certified["greedy_tokens_equal"] == found.certified["greedy_tokens_compared"] > 2
    (machine,) = found.machines
    assert machine.facts["packages"]["onnxruntime"]
    assert found.to_json()["host"]["machine"] == machine.facts["machine"]
    assert found.name == "host onnx"


def test_tokens_that_differ_from_the_certificate_fail(bundle: Bundle) -> None:
    def change(details: dict) -> None:
        details["answers"][0][0] = (details["answers"][0][0] + 1) % 300

    found = verify_bundle(change_parity(bundle, change), SAMPLES, CTX)
    assert found.found.failures() == [
        f"parity of onnx: greedy.mismatch_share is "
        f"{1 / found.certified['greedy_tokens_compared']:.4g}, at most 0.01 is required"
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda details: details.update(answers=details["answers"][:1]),
        lambda details: details.update(answers=[["a"], ["b"]]),
        lambda details: details.pop("questions"),
    ],
)
def test_a_certificate_that_cannot_be_read_is_refused(
    change: Callable[[dict], None], bundle: Bundle
) -> None:
    with pytest.raises(BundleError, match=r"parity\.json: targets\.onnx\.details"):
        verify_bundle(change_parity(bundle, change), SAMPLES, CTX)


def test_other_questions_are_compared_with_no_certificate(made: Path) -> None:
    found = verify_bundle(Bundle.open(made), OTHERS, CTX, tokens=2)
    assert found.found.passed
    assert found.certified is None
    assert found.to_json()["certified_tokens"] is None


def test_questions_without_pictures_are_refused(made: Path) -> None:
    with pytest.raises(InputError, match="text: no question has a picture"):
        verify_bundle(Bundle.open(made), TEXT, CTX)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was ended by signal 9, without a result"),
        ("print('half a'); raise SystemExit(3)", "ended with 3, without a result: half a"),
        ("import sys; sys.exit('no room')", "ended with 1, without a result: no room"),
        ('print(\'{"status": "ok", "machine": {}}\')', "is not a whole recording"),
    ],
)
def test_a_recorder_that_leaves_nothing_is_a_failure(
    program: str, said: str, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(name="host", command=[sys.executable, "-c", program])
    monkeypatch.setattr(verification, "host_place", lambda: place)
    with pytest.raises(CheckFailedError, match=said) as raised:
        verify_bundle(Bundle.open(made), SAMPLES, CTX)
    assert "\n" not in str(raised.value)


def test_a_bundle_that_a_recorder_cannot_use_is_named(bundle: Bundle) -> None:
    (bundle.path / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"host: .*tokenizer\.json"):
        verify_bundle(bundle, SAMPLES, CTX)


def test_runtimes_that_the_environment_lacks_are_refused(made: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(made)
    components = tuple(replace(each, target="executorch") for each in bundle.manifest.components)
    other = replace(bundle, manifest=replace(bundle.manifest, components=components))
    nowhere = Emulator(environment=Environment(folder=tmp_path))
    with pytest.raises(
        UnsupportedError, match="executorch is not in the ARM64 environment, which runs onnx"
    ):
        verify_bundle(other, SAMPLES, CTX, emulator=nowhere)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("bundle", "--arch", "riscv64"), "--arch is 'riscv64'; allowed are host, arm64"),
        (("bundle", "--cpu", "max"), "--cpu and --prepare are for --arch arm64"),
        ((), "there is nothing to verify: name a bundle's folder"),
        (("no bundle\nhere",), "no bundle here: manifest.json is missing"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_to_exit_code(lambda: run_command(["verify", *arguments]))
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_arm64_answers_as_this_host_does(bundle: Bundle, emulator: Emulator) -> None:
    assert int(emulator.version().partition(".")[0]) >= 10
    options = ("--arch", "arm64", "--n", 1, "--tokens", 3, "--write", "--json")
    found = fork_cli("verify", bundle.path, *options, check=0)
    document = json.loads(found.stdout)
    assert document["passed"]
    assert document["host"]["machine"] == "aarch64"
    assert "asimddp" in document["host"]["instruction_sets"]
    host, arm64 = document["machines"]
    assert host["emulator"] is None
    assert arm64["emulator"]["cpu"] == "cortex-a76"
    assert arm64["facts"]["engine"].startswith("ONNX Runtime ")
    (target,) = document["targets"].values()
    checks = {check["metric"]: check["value"] for check in target["checks"]}
    assert checks["input.pixels_max_abs"] == 0
    assert checks["input.prompts_equal"] == 1
    assert checks["chain.sqnr_db"] < 200  # other kernels round otherwise: it did not run here
    written = json.loads((bundle.path / "parity.json").read_text())
    assert written["verified"] == {"arm64 cortex-a76 onnx": document}
    assert written["targets"]
    Bundle.open(bundle.path)
