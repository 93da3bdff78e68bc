"""Training batches, drawn by step and gathered in advance."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from consistency.base.seeding import generator
from consistency.data.prepared import ImageData, to_signed


class Batches:
    """Batches drawn with replacement; the batch of step k depends on (seed, purpose, k) alone.

    count: images in the global batch; share: this process's rows of it; flip: mirror each image with probability 1/2;
    on_device: keep the dataset in the device's memory (None: on a GPU, if it takes less than 1/16 of it). Otherwise a
    thread gathers the next batches into pinned memory while the device computes. The device converts and flips.
    """

    def __init__(
        self,
        data: ImageData,
        count: int,
        share: slice,
        *,
        seed: int,
        purpose: str,
        flip: bool,
        device: torch.device,
        on_device: bool | None = None,
    ) -> None:
        self.data, self.count, self.share, self.flip, self.device = data, count, share, flip, device
        self._seed, self._purpose = seed, purpose
        self._images: Tensor | None = None
        if on_device is None and device.type == "cuda":
            on_device = data.images.nbytes < torch.cuda.get_device_properties(device).total_memory / 16
        if on_device:
            self._images = _copied(data.images, device)
        self._ahead: dict[int, Future[_Gathered]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return this process's share of the step's batch: float32 [n, C, H, W] in [-1, 1] and labels int64 [n]."""
        for ahead in range(step, step + 1 + _AHEAD):
            if ahead not in self._ahead:
                self._ahead[ahead] = self._thread.submit(self._gather, ahead)
        here = self._ahead.pop(step).result()
        source, labels, mirror = (tensor.to(self.device, non_blocking=True) for tensor in here)
        images = to_signed(source if self._images is None else self._images[source])
        if self.flip:
            images = torch.where(mirror[:, None, None, None], images.flip(3), images)
        return images, labels

    def _gather(self, step: int) -> "_Gathered":
        """Gather on the CPU: images (uint8, or rows of those on the device), labels and mask of mirrored images."""
        draws = generator(self._seed, f"{self._purpose} batch", step)
        rows = torch.randint(len(self.data), (self.count,), generator=draws)[self.share]
        mirror = (torch.rand(self.count, generator=draws) < 0.5)[self.share]
        source = rows if self._images is not None else torch.from_numpy(self.data.images[rows.numpy()])
        labels = torch.from_numpy(self.data.labels[rows.numpy()])
        if self.device.type == "cpu":
            return source, labels, mirror
        # Only copies from pinned memory overlap with computation.
        return source.pin_memory(), labels.pin_memory(), mirror.pin_memory()


_AHEAD = 2  # batches gathered in advance
_Gathered = tuple[Tensor, Tensor, Tensor]


def _copied(images: np.ndarray, device: torch.device) -> Tensor:
    """Copy all images to the device in chunks, to bound the host's memory."""
    copy = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(images), 8192):
        copy[start : start + 8192] = torch.from_numpy(np.array(images[start : start + 8192])).to(device)
    return copy
