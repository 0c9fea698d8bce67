"""State on the host where no GPU is: copies that happen as late as they may, of rows taken for offloaded."""

import torch

from lucid.engine import offload


class LateCopies:
    """Copies as a GPU's, each done when someone waits for it and not before."""

    def __init__(self, log):
        self.log = log
        self.inward, self.outward = {}, {}

    def staging(self, size):
        return torch.full((size,), 0x7F, dtype=torch.uint8)  # large numbers to whoever reads too early

    def begin(self):
        self.log.append("begin")

    def fetch(self, slot, pairs):
        assert slot not in self.inward, "fetched over what nobody has waited for"
        self.log.append(("fetch", slot))
        self._sent(slot)
        self.inward[slot] = pairs

    def wait(self, slot):
        self.log.append(("wait", slot))
        for target, source in self.inward.pop(slot):
            target.copy_(source)

    def send(self, slot, target, source):
        self.log.append(("send", slot))
        assert slot not in self.outward
        self.outward[slot] = (target, source)

    def end(self):
        self.log.append("end")
        assert not self.inward
        for slot in list(self.outward):
            self._sent(slot)

    def _sent(self, slot):
        if slot in self.outward:
            target, source = self.outward.pop(slot)
            target.copy_(source)


def offload_all(monkeypatch, log):
    """Take the state of every row for one on the host; a chunk is 64 bytes, and `log` has what the copies do."""
    monkeypatch.setattr(offload, "is_offloaded", lambda row: True)
    monkeypatch.setattr(offload, "copies_for", lambda device: LateCopies(log))
    monkeypatch.setattr(offload, "PIECE_BYTES", 64)
