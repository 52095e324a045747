"""References as parts: both give the sums of the model as it was."""

import pytest
import torch

import rewarm
from rewarm.functional.sequences import sequence_sums
from rewarm.lightning_modules.reference import CachedReference, FrozenReference
from tests import fits, tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),
]


class Watched(rewarm.DPO):
    """Keeps what the reference said of each batch."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        source = self.cached or FrozenReference(self)
        self.said = source.sums(batch, "train"), batch


def test_both_references_give_the_sums_of_the_initial_weights(tmp_path):
    files = fits.Files(tmp_path)
    for kind in ("cached", "frozen"):
        torch.manual_seed(0)
        start = rewarm.DPO(tiny.LLAMA)
        start.configure_model()
        torch.manual_seed(0)
        module = Watched(tiny.LLAMA, fits.sgd(0.3), reference=kind)
        fits.trainer(max_steps=3).fit(module, datamodule=fits.preferences(files))
        sums, batch = module.said
        with torch.no_grad():
            expected = sequence_sums(start.logprobs(batch), batch["sequence_ids"], len(batch["ids"]))
        torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-4)
        assert not torch.allclose(module.logprobs(batch), start.logprobs(batch), atol=1e-3)


def test_a_cached_reference_tells_which_data_it_lacks():
    module = rewarm.DPO(tiny.LLAMA, fits.sgd())
    with pytest.raises(ValueError, match=r"reads the data through datamodule.scoring_dataloader\(split\)"):
        fits.trainer(max_steps=1).fit(module, rewarm.WindowLoader([fits.pair_batch([], [])], 1))


def test_a_batch_without_ids_has_no_cached_reference():
    module = rewarm.DPO(tiny.LLAMA)
    cached = CachedReference(module)
    cached.load_state_dict({"tables": {"train": torch.zeros(3, 2)}, "made_from": {}})
    with pytest.raises(ValueError, match="the batch has no 'ids', by which reference 'cached' is read"):
        cached.sums({"targets": torch.zeros(2, 2)}, "train")


def test_the_state_brings_the_tables_and_what_they_were_made_from(tmp_path):
    files = fits.Files(tmp_path)
    module = rewarm.DPO(tiny.LLAMA, fits.sgd())
    data = fits.preferences(files)
    fits.trainer(max_steps=1).fit(module, datamodule=data)
    state = module.cached.state_dict()
    assert state["tables"]["train"].shape == (48, 2)
    assert state["made_from"]["train"] == data.fingerprint("train")
    assert state["made_from"]["train"]["examples"] == 48
    assert data.fingerprint("train") != fits.preferences(files).fingerprint("val")
