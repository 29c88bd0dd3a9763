"""Each prompt is given the rows of its own picture's tiles, whatever the other pictures have."""

from __future__ import annotations

import pytest
import torch

from pocketvlm.calibration import CalibrationSet, Sample
from pocketvlm.calibration.data.prompts import PromptBatch, encode_samples, tile_rows
from pocketvlm.calibration.gradients.backward import enter_decoder
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.reference_graph.forward import VisualTokens, embed_prompts, encode_images


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("tiles") / "model"
    write_tiny_model("smolvlm-tiles", folder)
    return Checkpoint.load(folder)


@torch.no_grad()
def test_a_prompt_takes_the_tiles_of_its_picture(checkpoint):
    sizes = ((96, 96), (150, 60), (192, 40))
    found = CalibrationSet.from_reference(0, len(sizes))
    pictures = [sample.open_image().resize(size) for sample, size in zip(found, sizes, strict=True)]
    samples = CalibrationSet(
        name="tiles",
        samples=tuple(
            Sample(image=picture, question=sample.question, answer=sample.answer)
            for sample, picture in zip(found, pictures, strict=True)
        ),
    )
    prompts = encode_samples(checkpoint.processor, samples)
    assert [prompt.tiles for prompt in prompts] == [10, 7, 4]
    assert tile_rows(prompts, [1]) == list(range(10, 17))
    assert tile_rows(prompts, [2, 0]) == [*range(17, 21), *range(10)]
    parts = [
        encode_images(checkpoint, checkpoint.processor.pixels([picture])) for picture in pictures
    ]
    visual = VisualTokens(
        embeds=torch.cat([part.embeds for part in parts]),
        indices=torch.cat([part.indices for part in parts]),
    )
    for index, (prompt, own) in enumerate(zip(prompts, parts, strict=True)):
        expected = embed_prompts(checkpoint, torch.tensor([prompt.token_ids]), own)
        batch = PromptBatch(samples=(index,), held_out=False)
        inputs, _ = enter_decoder(checkpoint, prompts, batch, visual)
        assert torch.equal(inputs.embeds, expected.embeds)
        assert torch.equal(inputs.positions, expected.positions)
