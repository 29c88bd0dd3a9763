"""Predicts how long the stages of a recipe take: what they compute, counted, at measured rates.

Counted of GPTQ: the forward passes of the walk, second moments, factorizations, and the rounding of
every layer. Not counted: activation functions and norms, files, and what follows the stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pocketvlm.compress.layerwise.hessian import diagonal_block_width
from pocketvlm.compress.layerwise.row_chunks import count_chunks
from pocketvlm.compress.quantization.affine.gptq import Gptq
from pocketvlm.compress.quantization.affine.grid import GridKind
from pocketvlm.compress.quantization.rules import plan_layouts
from pocketvlm.models.blocks import BlockSpec
from pocketvlm.models.images.tilings.tile_grid import ONE_TILE
from pocketvlm.models.layers import LinearSpec
from pocketvlm.models.spec import ModelSpec
from pocketvlm.pipeline.compress_time.rates import CompressRates, read_compress_calibration
from pocketvlm.stages import PlanState, Stage
from pocketvlm.stages.photo import PHOTO
from pocketvlm.weights.layout import WeightLayout

__all__ = ["CompressTime", "predict_compress_time"]

_TEXT_TOKENS = 32
"""Of a calibration sample: its template, question and answer."""

_WITHOUT_COMPUTE = frozenset(
    {
        "add_grid",
        "choose_grid",
        "limit_tiles",
        "reduce_tokens",
        "set_resolution",
        "skip_empty_tiles",
    }
)
_S_PER_HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class CompressTime:
    """How long the stages of a recipe take on this host.

    Attributes:
        basis: When the rates were measured; where there are none, why.
        samples: Calibration samples.
        weights: Weights of the source.
        seconds: By the number of threads; empty where nothing could be predicted.
    """

    basis: str
    samples: int
    weights: int
    seconds: Mapping[str, float]

    def lines(self) -> list[str]:
        """The prediction for people."""
        if not self.seconds:
            return [f"stages         time not predicted: {self.basis}"]
        hours = {threads: taken / _S_PER_HOUR for threads, taken in self.seconds.items()}
        return [
            f"stages         {one:.2f} h with {threads} thread{'s' if threads != '1' else ''}, "
            f"{one / self.weights * 1e9:.2f} h a billion weights, predicted for {self.samples} "
            "samples on this host"
            for threads, one in hours.items()
        ]


def predict_compress_time(
    state: PlanState, stages: Sequence[Stage], *, samples: int
) -> CompressTime | None:
    """Predicts the time of stages; `None` where none of them computes.

    Args:
        state: The model as they leave it.
        stages: The stages.
        samples: Calibration samples.
    """
    computing = [stage for stage in stages if stage.method not in _WITHOUT_COMPUTE]
    if not computing:
        return None
    unknown = [stage.method for stage in computing if not isinstance(stage, Gptq)]
    weights = sum(linear.in_features * linear.out_features for linear in state.spec.linears())
    if unknown:
        basis = f"nothing was measured of {', '.join(dict.fromkeys(unknown))}"
        return CompressTime(basis=basis, samples=samples, weights=weights, seconds={})
    found = read_compress_calibration()
    if isinstance(found, str):
        return CompressTime(basis=found, samples=samples, weights=weights, seconds={})
    walks = [_Walk.of(state, stage, samples) for stage in computing if isinstance(stage, Gptq)]
    return CompressTime(
        basis=f"calibrated {found.measured_at}",
        samples=samples,
        weights=weights,
        seconds={str(one.threads): sum(walk.seconds(one) for walk in walks) for one in found.rates},
    )


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """Tokens of one part of the model: all of them run, some are measured.

    Attributes:
        tokens: That run through it.
        measured: That enter moments.
        seen: Tokens that a token attends to.
    """

    tokens: int
    measured: int
    seen: int = 0


@dataclass(frozen=True, kw_only=True)
class _Walk:
    """A pass of GPTQ over a model."""

    spec: ModelSpec
    grid: GridKind
    layouts: Mapping[LinearSpec, WeightLayout | None]
    tower: _Pass
    projector: _Pass
    decoder: _Pass

    @classmethod
    def of(cls, state: PlanState, stage: Gptq, samples: int) -> _Walk:
        """The pass of a stage over a planned model, on pictures of the size of a photo."""
        spec, tower = state.spec, state.spec.tower
        grid = ONE_TILE if spec.tiling is None else spec.tiling.grid(*PHOTO)
        held = min(math.ceil(samples * stage.held_out), samples - 1)
        per_sample = grid.tiles * tower.tokens
        fitted = min(samples - held, max(1, stage.tower_tokens // per_sample))
        judging = min(held, max(1, math.ceil(fitted * stage.held_out)))
        rows = state.most_rows(grid) + _TEXT_TOKENS
        return cls(
            spec=spec,
            grid=stage.grid,
            layouts=plan_layouts(stage.rules, spec.linears()),
            tower=_Pass(
                tokens=samples * per_sample,
                measured=(fitted + judging) * per_sample,
                seen=tower.tokens,
            ),
            projector=_Pass(
                tokens=samples * state.most_rows(grid), measured=samples * state.most_rows(grid)
            ),
            decoder=_Pass(tokens=samples * rows, measured=samples * rows, seen=rows),
        )

    def seconds(self, rates: CompressRates) -> float:
        """Time of the pass."""
        return sum(self._parts(rates))

    def _parts(self, rates: CompressRates) -> Iterator[float]:
        spec, decoder = self.spec, self.spec.decoder
        by_name = {linear.name: linear for linear in self.layouts}
        for block in spec.tower.blocks[: spec.tower.feature_block + 1]:
            attention, ffn = block.attention, block.ffn
            seen = self.tower.seen if attention.window is None else attention.window**2
            yield from self._sublayer(rates, by_name, self.tower, attention.inputs, attention.o)
            yield self._attention(rates, self.tower, seen, spec.tower.hidden_size)
            yield from self._sublayer(rates, by_name, self.tower, ffn.inputs, ffn.down)
        for linear in by_name.values():
            if linear.part == "projector":
                yield from self._sublayer(rates, by_name, self.projector, (), linear.name)
        for layer in decoder.blocks:
            mixer, ffn = layer.mixer, layer.ffn
            yield from self._sublayer(rates, by_name, self.decoder, mixer.inputs, mixer.output)
            if isinstance(layer, BlockSpec):
                width = decoder.heads * decoder.head_dim
                yield self._attention(rates, self.decoder, self.decoder.seen, width)
            yield from self._sublayer(rates, by_name, self.decoder, ffn.inputs, ffn.down)
        head = by_name[decoder.embedding if decoder.tied_head else decoder.head]
        yield from self._group(rates, [head], self.decoder.measured)
        if not decoder.tied_head and self.layouts[by_name[decoder.embedding]] is not None:
            table = by_name[decoder.embedding]
            yield table.in_features * table.out_features * rates.rounding[self.grid].weight_ns / 1e9

    def _sublayer(
        self,
        rates: CompressRates,
        by_name: Mapping[str, LinearSpec],
        run: _Pass,
        first: Sequence[str],
        last: str,
    ) -> Iterator[float]:
        """Moments of both inputs, both groups, and passes: the first linears run twice."""
        inputs, output = [by_name[name] for name in first], by_name[last]
        for linears in (inputs, [output]):
            if linears:
                yield from self._group(rates, linears, run.measured)
        for linear in (*inputs, output):
            tokens, passes = run.tokens, 1
            if linear is not output:
                tokens, passes = run.tokens + run.measured, 2
            weights = linear.in_features * linear.out_features
            yield tokens * weights / rates.product_macs_s
            if self.layouts[linear] is not None:
                yield passes * weights / rates.widened_weights_s

    def _attention(self, rates: CompressRates, run: _Pass, seen: int, width: int) -> float:
        return 2 * (run.tokens + run.measured) * seen * width / rates.attention_macs_s

    def _group(
        self, rates: CompressRates, linears: Sequence[LinearSpec], measured: int
    ) -> Iterator[float]:
        """Linears that read one input: its moments and factors, and their rounding."""
        rounded = [linear for linear in linears if self.layouts[linear] is not None]
        if not rounded:
            return
        width = rounded[0].in_features
        block = diagonal_block_width(width, ()) or width
        yield measured * width * block / rates.moment_macs_s
        yield math.ceil(width / block) * rates.factorization_s(block)
        for linear in rounded:
            chunks = count_chunks(linear.out_features, width)
            pieces = math.ceil(width / block)
            yield pieces * rates.rounding[self.grid].seconds(
                linear.out_features, block, chunks=chunks
            )
