"""Replay: a few old conversations among the new ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from kore.baselines.base import Options
from kore.baselines.lora import LoRA
from kore.data.drawing import draw
from kore.errors import ConfigError

if TYPE_CHECKING:
    from kore.data import Conversation


class ReplayOptions(Options):
    share: float = Field(0.1, ge=0, allow_inf_nan=False, description="old conversations over new ones")


class Replay(LoRA):
    """A LoRA trained on all new conversations and n_old = round(share · n_new) old ones.

    L = −(1/T) Σ log p(answer token), over the T answer tokens of both: an old token weighs what a new one does. The old
    conversations are drawn once, without replacement, each old file in its share, and mixed with the new ones by the
    run's seed; nothing is drawn anew in later epochs. With a share of 0 the data is that of ``lora``, in its order.

    With ``train.epochs`` a share of 0.1 takes 10 % more steps than the other methods, and sees every new conversation
    as often as they do; with ``train.max_steps`` the steps are the same, and every eleventh example is an old one.

    The paper says "10 %" without saying of what; the published data file is one random mixture, 10 % by its name.

    Stored beside the adapter: nothing.
    """

    method = "replay"
    title = "Replay"
    source = (
        "KORE's baseline (arXiv 2510.19316, appendix B.4); experience replay, Rolnick et al. 2019, arXiv 1811.11682"
    )
    reads_old = True
    Options = ReplayOptions

    def conversations(
        self, new: Sequence[Conversation], old: Sequence[Conversation] = (), seed: int = 0
    ) -> list[Conversation]:
        """New and old ones in mixed order.

        Raises:
            ConfigError: There are no old ones, fewer than asked for, or the share comes to none.
        """
        self.check_old(old)
        share = self.options.share
        if share == 0:
            return list(new)
        count = round(share * len(new))
        if count == 0:
            raise ConfigError(f"options.share: {share:g} of {len(new)} new conversations is none; raise it")
        if count > len(old):
            raise ConfigError(
                f"options.share: {share:g} of {len(new)} new conversations is {count}, and there are {len(old)} old "
                "ones; add old data or lower the share"
            )
        mixed = [*new, *draw(old, count, seed)]
        random.Random(seed).shuffle(mixed)
        return mixed
