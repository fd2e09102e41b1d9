"""What LlamaIndex stores of a component that corrects: its options, not the aligner."""

from __future__ import annotations

from typing import Any, Self

from llama_index.core.bridge.pydantic import ConfigDict, Field
from llama_index.core.schema import BaseComponent

from aligner_integrations.aligner import Aligner


class StoresOptions(BaseComponent):
    """A component whose aligner is not stored; the bundled one never takes the place of another unasked."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    aligner: Aligner | None = Field(default=None, exclude=True)

    def __init__(self, **data: Any) -> None:
        super().__init__(**data)

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Return the options; of an aligner of your own only what tells it from others."""
        data = super().to_dict(**kwargs)
        return data if self.aligner is None else data | {"aligner_source": self.aligner.source}

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> Self:
        """Make one from what `to_dict` gave.

        Raises:
            ValueError: it corrected with an aligner of your own, and `aligner=` is not given.
        """
        data = dict(data)
        if data.pop("aligner_source", None) is not None and kwargs.get("aligner") is None:
            raise ValueError(
                f"this {cls.__name__} had an aligner of its own, which is not stored; give "
                "from_dict(data, aligner=Aligner.from_pretrained(...))"
            )
        return super().from_dict(data, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        if self.aligner is not None:  # LlamaIndex would leave it out, and the bundled one take its place
            raise TypeError(
                f"an {type(self).__name__} with an aligner of its own cannot be pickled; take to_dict() and "
                "from_dict(data, aligner=Aligner.from_pretrained(...))"
            )
        return super().__getstate__()
