"""Our forward pass of one sublayer on given inputs, and our stack as a source of results."""

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from manifold_hc import functional
from manifold_hc.connection import Connection
from manifold_hc.functional import Reading
from manifold_hc.stack import Stack
from manifold_hc.verify.observation import EXIT, Inputs, Observation, Streams


class Forward:
    """Connections of a stack in one dtype, each computed on inputs of its own."""

    def __init__(
        self, stack: Stack, dtype: torch.dtype = torch.float64, backend: str | None = None
    ) -> None:
        """Copy the stack: its own parameters keep their dtype. backend: None for the stack's."""
        config = replace(stack.config, backend=backend or stack.config.backend)
        self.stack = Stack(channels_of(stack), config, len(stack.connections)).to(dtype)
        self.stack.load_state_dict(stack.state_dict())
        self.stack.requires_grad_(False)
        self.dtype = dtype
        self.single_pass = stack.config.is_single_pass

    def results(
        self, index: int, inputs: Streams, before: Float[Tensor, "N n C"] | None
    ) -> dict[str, Tensor]:
        """Compute pre, post, res, u and new of a sublayer, or h of the exit.

        before: streams that the sublayer before took; in single pass their pre reads the input.
        Where they are missing there, u is left out.
        """
        x = inputs.x.to(self.dtype)
        if index == EXIT:
            return self._exit(x, before)
        connection = cast(Connection, self.stack.connections[index])
        pre = self._pre(index - 1, before) if self.single_pass and index else None
        reading: Reading = connection.maps(x, previous_pre=pre)
        y = cast(Tensor, inputs.y).to(self.dtype)
        backend = self.stack.config.backend
        new = functional.write(x, y, reading.post, reading.res, backend)
        found = {"pre": reading.pre, "post": reading.post, "res": reading.res}
        if not (self.single_pass and index and pre is None):
            found["u"] = reading.u
        return found | {"new": new}

    def _exit(self, x: Tensor, before: Tensor | None) -> dict[str, Tensor]:
        if self.stack.config.exit_rule != "pre":
            return {"h": self.stack.collapse(x)}
        pre = self._pre(len(self.stack.connections) - 1, before)
        return {} if pre is None else {"h": self.stack.collapse(x, pre)}

    def _pre(self, index: int, x: Tensor | None) -> Tensor | None:
        """Return the pre of a sublayer, which in single pass the next one reads with."""
        if x is None:
            return None
        reading: Reading = cast(Connection, self.stack.connections[index]).maps(x.to(self.dtype))
        return reading.pre


class StackSource:
    """A second stack, as an implementation to compare with."""

    def __init__(self, stack: Stack, inputs: Inputs, name: str) -> None:
        """Compute in the dtype of the inputs."""
        self.name = name
        self.precision = inputs.dtype
        self._inputs = inputs
        self._forward = Forward(stack, inputs.dtype)
        self._sublayers = len(stack.connections)

    def observations(self) -> Iterator[Observation]:
        """Yield every sublayer in depth order, then the exit."""
        before = None
        for index in (*range(self._sublayers), EXIT):
            inputs = self._inputs.of(index)
            yield Observation(index, inputs, self._forward.results(index, inputs, before))
            before = inputs.x


def channels_of(stack: Stack) -> int:
    """Return the channels C of a stack."""
    return cast(Connection, stack.connections[0]).channels
