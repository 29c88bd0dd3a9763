"""What a solver chose for every layer of a model, and what else it could have been."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from pocketvlm.compress.quantization.codebook.shared import SharedKey, disown, shared_key
from pocketvlm.compress.quantization.mixed.knapsack import (
    Candidate,
    allocate,
    least_bytes,
    price_of_a_byte,
    total_bytes,
)
from pocketvlm.compress.quantization.mixed.search_space import (
    Option,
    label_of,
    plan_option,
    prior_loss,
)
from pocketvlm.compress.quantization.mixed.sensitivity import Sensitivity
from pocketvlm.errors import RecipeError
from pocketvlm.models.layers import LinearSpec
from pocketvlm.weights.layout import LayerBytes, WeightLayout

__all__ = ["Menu", "Solution", "solve_menu"]


@dataclass(frozen=True, kw_only=True)
class Menu:
    """What every layer may become, and whose bytes count.

    Attributes:
        options: Of each layer; a pinned one has a single option.
        float_bytes: Bytes of each layer that stays as it is.
        densities: Shares of kept elements by name, for layers under a mask.
        layer_bytes: What a layout takes in the files that are counted.
    """

    options: Mapping[LinearSpec, Sequence[Option]]
    float_bytes: Mapping[LinearSpec, int]
    densities: Mapping[str, float]
    layer_bytes: LayerBytes

    @property
    def weights(self) -> int:
        """Elements of all layers."""
        return sum(linear.out_features * linear.in_features for linear in self.options)

    @property
    def choices(self) -> dict[LinearSpec, Sequence[Option]]:
        """The layers that have a choice: nothing else has to be measured."""
        return {linear: options for linear, options in self.options.items() if len(options) > 1}

    def readers(self) -> Iterator[tuple[Option, LinearSpec]]:
        """Every option of every layer."""
        for linear, options in self.options.items():
            for option in options:
                yield option, linear

    def shared_bytes(self) -> dict[SharedKey, int]:
        """Bytes of all codebooks that several layers may share."""
        found: dict[SharedKey, int] = {}
        for option, linear in self.readers():
            key = shared_key(option, linear)
            if key is not None:
                owner = replace(key[0].plan(linear), owns_codebooks=True)
                found[key] = self._count(owner, linear) - self._count(disown(owner), linear)
        return found

    def _count(self, layout: WeightLayout, linear: LinearSpec) -> int:
        return self.layer_bytes(layout, (linear.out_features, linear.in_features))

    def candidate(
        self, linear: LinearSpec, option: Option, tables: Sequence[SharedKey], loss: float | None
    ) -> Candidate:
        """What an option costs a layer, with a measured loss or with the prior's."""
        if option.keeps_float:
            return Candidate(loss=0.0, size=self.float_bytes[linear])
        form = plan_option(option, linear, self.densities.get(linear.name))
        key = shared_key(option, linear)
        return Candidate(
            loss=prior_loss(form, linear) if loss is None else loss,
            size=self._count(disown(form), linear),
            table=None if key is None else tables.index(key),
        )


@dataclass(frozen=True, kw_only=True)
class Solution:
    """One option a layer.

    Attributes:
        menu: What was to choose from.
        candidates: Loss and bytes of each option of each layer.
        tables: Bytes of each table that layers may share.
        places: Index of the chosen option.
        budget: Bytes that were allowed.
        price: Loss that one more byte would save.
    """

    menu: Menu
    candidates: Sequence[Sequence[Candidate]]
    tables: Sequence[int]
    places: Sequence[int]
    budget: int
    price: float

    @property
    def chosen(self) -> dict[LinearSpec, Option]:
        """The option of each layer."""
        rows = zip(self.menu.options.items(), self.places, strict=True)
        return {linear: options[place] for (linear, options), place in rows}

    @property
    def size(self) -> int:
        """Bytes of all chosen options, with the tables that they share."""
        return total_bytes(self.candidates, self.places, self.tables)

    @property
    def loss(self) -> float:
        """Sum of the losses of all chosen options."""
        return sum(row[place].loss for row, place in zip(self.candidates, self.places, strict=True))

    def rules(self) -> tuple[Option, ...]:
        """One rule an option, which names its layers: those of one part may share codebooks."""
        layers: dict[Option, list[str]] = {}
        for linear, option in self.chosen.items():
            layers.setdefault(option, []).append(re.escape(linear.name))
        return tuple(
            replace(option, part=None, blocks=None, match="|".join(names))
            for option, names in layers.items()
        )

    def digest(self) -> str:
        """Names a folder for layers that were quantized so and not otherwise."""
        content = json.dumps([asdict(rule) for rule in self.rules()])
        return "solved-" + hashlib.sha256(content.encode()).hexdigest()[:12]

    def describe(self, name: str) -> dict[str, object]:
        """The solver's part of a layer's row.

        The runner-up is the option that comes next when bytes have the solution's price; one that
        needs a table which no layer reads would have to pay for all of it.
        """
        number = next(i for i, linear in enumerate(self.menu.options) if linear.name == name)
        options = tuple(self.menu.options.values())[number]
        row, place = self.candidates[number], self.places[number]
        others = [index for index in range(len(options)) if index != place]
        described: dict[str, object] = {
            "divergence": row[place].loss,
            "chosen_bytes": row[place].size,
            "runner_up": None,
        }
        if others:
            read = _tables_read(self.candidates, self.places)

            def cost(index: int) -> tuple[float, int]:
                item = row[index]
                is_paid = item.table is None or item.table in read
                size = item.size + (0 if is_paid else self.tables[item.table or 0])
                return item.loss + self.price * size, index

            second = min(others, key=cost)
            described["runner_up"] = label_of(options[second])
            described["runner_up_divergence"] = row[second].loss
            described["runner_up_bytes"] = row[second].size
        return described


def solve_menu(menu: Menu, budget: int, measured: Sensitivity | None) -> Solution:
    """Chooses an option for every layer.

    Args:
        menu: What to choose from.
        budget: Bytes that may be used.
        measured: Losses of the layers that have a choice; `None` takes the prior's.

    Raises:
        RecipeError: The budget is below the smallest possible.
    """
    shared = menu.shared_bytes()
    keys, tables = tuple(shared), tuple(shared.values())
    candidates = []
    for linear, options in menu.options.items():
        if len(options) == 1:
            candidates.append([menu.candidate(linear, options[0], keys, 0.0)])
            continue
        losses = None if measured is None else measured.layers[linear.name]
        candidates.append(
            [
                menu.candidate(
                    linear, option, keys, None if losses is None else losses[label_of(option)].loss
                )
                for option in options
            ]
        )
    smallest = least_bytes(candidates, tables)
    if smallest > budget:
        weights = menu.weights
        raise RecipeError(
            f"the budget of {budget} bytes, {budget * 8 / weights:.3f} bits per weight, is below "
            f"the smallest that the options allow: {smallest} bytes, "
            f"{smallest * 8 / weights:.3f} bits"
        )
    places = allocate(candidates, budget, tables)
    read = _tables_read(candidates, places)
    return Solution(
        menu=menu,
        candidates=candidates,
        tables=tables,
        places=places,
        budget=budget,
        price=price_of_a_byte(candidates, budget, tables, read),
    )


def _tables_read(
    candidates: Sequence[Sequence[Candidate]], places: Sequence[int]
) -> tuple[int, ...]:
    """Tables that a choice reads, in order."""
    items = (row[place] for row, place in zip(candidates, places, strict=True))
    return tuple(sorted({item.table for item in items if item.table is not None}))
