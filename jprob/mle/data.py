"""Sources of batches: a function of the step, or anything that is iterated. Arrays need no source.

A source that can tell its position is resumed exactly. Such a source has `state_dict` and `load_state_dict`, as in
torchdata, or its iterator has `get_state` and `set_state`, as in Grain.
"""

import base64
import json
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import PyTree

from .. import _checks

_END = object()


class EndedError(Exception):
    """The source gives no more batches, or failed; the message says which."""


class Function:
    """Batches from `batch_at(step)`; it has no position but the step."""

    has_position, once = True, False

    def __init__(self, batch_at: Any) -> None:
        """Keeps the function."""
        self.batch_at = batch_at

    def next(self, step: int) -> PyTree:
        """The batch of a step."""
        try:
            return self.batch_at(step)
        except Exception as error:
            raise EndedError(f"data({step}) failed: {_first_line(error)}") from error

    def position(self) -> Any:
        """None: the step says it."""

    def seek(self, position: Any) -> None:
        """Nothing: the step says it."""


class Iterated:
    """Batches of an iterable, iterated again at its end, or of an iterator, which ends once."""

    def __init__(self, data: Any) -> None:
        """Begins at the first batch."""
        self.data, self.iterator, self.given = data, None, 0
        self.once = iter(data) is data
        self.by_iterator = not hasattr(data, "state_dict") and hasattr(self._begun(), "get_state")
        self.has_position = self.by_iterator or hasattr(data, "state_dict")

    def next(self, step: int) -> PyTree:
        """The next batch, at any step; the first again after the last."""
        for _ in range(2):
            try:
                batch = next(self._begun(), _END)
            except Exception as error:
                raise EndedError(f"data failed after {self.given} batches: {_first_line(error)}") from error
            if batch is not _END:
                self.given += 1
                return batch
            if self.once:
                raise EndedError(f"data ended after {self.given} batches")
            self.iterator = None
        raise ValueError("fit: data must give batches each time they are iterated, got none")

    def position(self) -> Any:
        """The position of the next batch, in values of JSON; None if the source cannot tell."""
        if self.by_iterator:
            state = self._begun().get_state()
            is_bytes = isinstance(state, bytes)
            return {"base64": base64.b64encode(state).decode()} if is_bytes else json_copy("get_state()", state)
        return json_copy("state_dict() of data", self.data.state_dict()) if self.has_position else None

    def seek(self, position: Any) -> None:
        """Goes to a position, if there is one and the source has positions; else begins again."""
        if self.has_position or not self.once:  # an iterator without positions goes on from where it is
            self.iterator = None
        if position is not None and self.by_iterator:
            is_bytes = isinstance(position, dict) and position.keys() == {"base64"}
            self._begun().set_state(base64.b64decode(position["base64"]) if is_bytes else position)
        elif position is not None and self.has_position:
            self.data.load_state_dict(position)

    def _begun(self):
        if self.iterator is None:
            self.iterator = iter(self.data)
        return self.iterator


def opened(data: Any) -> Function | Iterated | None:
    """The source of these batches; None for arrays."""
    leaves = jax.tree.leaves(data, is_leaf=lambda x: isinstance(x, Iterator))
    arrays = leaves and all(hasattr(x, "shape") for x in leaves)
    got = _checks.describe(data)
    if isinstance(data, tuple | dict) and not arrays:
        got = f"a {got} with {_checks.describe(next((x for x in leaves if not hasattr(x, 'shape')), data))}"
    elif not isinstance(data, list | str) and (arrays or callable(data) or isinstance(data, Iterable)):
        return None if arrays else Function(data) if callable(data) else Iterated(data)
    forms = "arrays with one leading axis of examples (a tuple or dict of them), a function of the step"
    cure = "; pass a tuple of arrays, or lambda step: batches[step % len(batches)]" if isinstance(data, list) else ""
    raise ValueError(f"fit: data must be {forms}, or an iterable or iterator of batches, got {got}{cure}")


def on_device(tree: PyTree) -> PyTree:
    """Arrays of any library on the device; jax arrays stay where they are."""
    return jax.tree.map(lambda x: x if isinstance(x, Array) else jax.device_put(np.asarray(x)), tree)


def json_copy(name: str, value: Any) -> Any:
    """A copy that nobody changes later."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"fit: {name} must be made of values of JSON: {error}") from None


def _first_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0]
