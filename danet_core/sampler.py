"""P x K batches: P identities, K visible and K infrared images of each."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from danet_core.files import StudyError


class IdentitySampler:
    """Draws the batches of an epoch as positions into the training images.

    A batch holds `ids_per_batch` distinct identities, and of each `imgs_per_modality` visible images followed by as
    many infrared ones. Identities come from successive random permutations, so that each is seen equally often (what
    is left of a permutation and does not fill a batch is dropped); images of an identity and modality are drawn without
    replacement, and again from the start of the same random order where there are fewer than `imgs_per_modality`.

    Args:
        pids: identity of each training image, (N,).
        modalities: 0 visible, 1 infrared, (N,).
        ids_per_batch: P; the paper's 16.
        imgs_per_modality: K; the paper's 8 images per identity, read as 4 + 4.

    Raises StudyError for an identity with one modality only and for fewer identities than P.
    Source: the paper, "Implementation details"; equal numbers of both modalities as in Ye et al. 2018b.
    """

    def __init__(
        self, pids: Int[np.ndarray, " N"], modalities: Int[np.ndarray, " N"], ids_per_batch: int, imgs_per_modality: int
    ) -> None:
        self.identities = np.unique(pids)
        if len(self.identities) < ids_per_batch:
            raise StudyError(
                f"ids_per_batch: expected at most the {len(self.identities)} training identities, found {ids_per_batch}"
                "; lower it in params.yaml or add identities"
            )
        self.ids_per_batch, self.imgs_per_modality = ids_per_batch, imgs_per_modality
        self._members = [self._members_of(pids, modalities, modality) for modality in (0, 1)]
        self._counts = [(table >= 0).sum(axis=1) for table in self._members]
        for name, counts in zip(("visible", "infrared"), self._counts, strict=True):
            if (counts == 0).any():
                pid = self.identities[np.flatnonzero(counts == 0)[0]]
                raise StudyError(
                    f"training identity {pid} has no {name} image, and both modalities are needed; "
                    "restore its images or take the identity out of the training split"
                )

    def epoch(self, steps: int, generator: np.random.Generator) -> Int[np.ndarray, "S B"]:
        """Positions of `steps` batches, each of P x 2K images grouped by identity, visible before infrared."""
        per_permutation = len(self.identities) // self.ids_per_batch
        permutations = -(-steps // per_permutation)
        order = [generator.permutation(len(self.identities)) for _ in range(permutations)]
        used = per_permutation * self.ids_per_batch
        chosen = np.concatenate([permutation[:used] for permutation in order])[: steps * self.ids_per_batch]
        drawn = [self._draw(chosen, modality, generator) for modality in (0, 1)]
        return np.concatenate(drawn, axis=1).reshape(steps, -1)  # (S P, 2K) -> (S, B)

    def _members_of(
        self, pids: Int[np.ndarray, " N"], modalities: Int[np.ndarray, " N"], modality: int
    ) -> Int[np.ndarray, "C M"]:
        """Positions of each identity's images of one modality, padded with -1 to the longest row."""
        rows = [np.flatnonzero((pids == pid) & (modalities == modality)) for pid in self.identities]
        table = np.full((len(rows), max(len(row) for row in rows)), -1, dtype=np.int64)
        for index, row in enumerate(rows):
            table[index, : len(row)] = row
        return table

    def _draw(
        self, chosen: Int[np.ndarray, " I"], modality: int, generator: np.random.Generator
    ) -> Int[np.ndarray, "I K"]:
        members, counts = self._members[modality][chosen], self._counts[modality][chosen]
        keys = np.where(members >= 0, generator.random(members.shape), np.inf)
        shuffled = np.take_along_axis(members, np.argsort(keys, axis=1), axis=1)
        columns = np.arange(self.imgs_per_modality) % counts[:, None]
        return np.take_along_axis(shuffled, columns, axis=1)
