"""A token at random, from what the model holds likely: temperature, `top_k`, `top_p`, seed.

Drafts are verified by rejection sampling (Leviathan et al. 2023, section 2.3): a drafted token is accepted
with the probability that the model gives it over the one that the draft gives it, else one is drawn from what
is left of the model's distribution. A draft here is one token and nothing else, with probability 1. So
drawing from the model's distribution, and accepting where the draft holds that very token, is the same: the
draft's token x stays with probability p(x), and what comes in its place is distributed as p without x. Drawn
like this, a token takes one number of the generator whether it was drafted or not; hence the same seed writes
the same text with drafts and without.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from aligner_integrations.backends.base import Logits
from aligner_integrations.config import DecodeConfig

_Probabilities = npt.NDArray[np.float64]


class Sampler:
    """The random choices of one decoding; `config.seed` makes them the same each time."""

    def __init__(self, config: DecodeConfig) -> None:
        self._config = config
        self._numbers = np.random.default_rng(config.seed)

    def draw(self, logits: Logits) -> int:
        """Return the id of a token; `logits` is of shape (vocabulary,) and holds no NaN."""
        config = self._config
        chances = probabilities(
            logits, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p
        )
        bounds = chances.cumsum()
        # From the right: an id without any chance has no width, and is never met.
        found = int(np.searchsorted(bounds, self._numbers.random() * bounds[-1], side="right"))
        return min(found, int(chances.nonzero()[0][-1]))  # rounding may lead past the last


def probabilities(logits: Logits, *, temperature: float, top_k: int, top_p: float) -> _Probabilities:
    """Return the chance of each id, shape (vocabulary,), float64: the sum is 1.

    The order is that of transformers: temperature; then the `top_k` best ids (0 for all); then of those the
    fewest whose chances reach `top_p`. Among equals both take the lowest ids, as greedy decoding does; there
    transformers keeps more than `top_k`.
    """
    best = logits.max()
    distance = np.zeros(len(logits))
    # Not plainly the difference: the best may be infinite, and then it is the only one.
    np.subtract(logits, best, out=distance, where=logits != best, dtype=np.float64)
    with np.errstate(over="ignore"):  # by a tiny temperature: infinitely far is what is meant
        distance /= temperature
    if 0 < top_k < len(distance):
        edge = np.partition(distance, -top_k)[-top_k]
        stays = distance > edge
        stays[np.flatnonzero(distance == edge)[: top_k - int(stays.sum())]] = True
        distance[~stays] = -np.inf
    chances: _Probabilities = np.exp(distance)
    chances /= chances.sum()
    if top_p < 1.0:
        order = chances.nonzero()[0]  # after `top_k` these are few; sorting all would take longer
        order = order[np.argsort(-chances[order], kind="stable")]
        enough = int(np.searchsorted(chances[order].cumsum(), top_p)) + 1
        chances[order[enough:]] = 0.0
        chances /= chances.sum()
    return chances
