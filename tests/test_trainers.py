"""A training step under accelerate, Hugging Face's Trainer and Lightning: `pip install 'fxprop[trainers]'`."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxprop

KEEP = fxprop.Policy(keep=0.25, rules=[fxprop.Rule(position="output", keep=1.0)])


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))


def batches():
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(12, 8), torch.randint(0, 3, (12,))), batch_size=4)


def expected():
    """The parameters after an epoch of plain SGD on the transformed module."""
    gm, _ = fxprop.transform(classifier(), KEEP, (torch.randn(4, 8),))
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    for x, y in batches():
        optimizer.zero_grad()
        F.cross_entropy(gm(x), y).backward()
        optimizer.step()
    return list(gm.parameters())


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.cpu(), b, rtol=1e-5, atol=1e-7)


def test_the_comparison_can_fail():
    with pytest.raises(AssertionError, match="allclose"):
        assert_same(list(classifier().parameters()), expected())


def test_accelerate():
    accelerate = pytest.importorskip("accelerate", reason="needs fxprop[trainers]")
    accelerator = accelerate.Accelerator(cpu=True)
    gm, _ = fxprop.transform(classifier(), KEEP, (torch.randn(4, 8),))
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    scheduler = fxprop.KeepScheduler(gm, fxprop.schedules.Constant(0.25))
    module, optimizer, loader = accelerator.prepare(gm, optimizer, batches())
    accelerator.register_for_checkpointing(scheduler)
    for x, y in loader:
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(module(x), y))
        optimizer.step()
        scheduler.step()
    assert_same(list(accelerator.unwrap_model(module).parameters()), expected())


def test_hugging_face_trainer(tmp_path):
    pytest.importorskip("accelerate", reason="needs fxprop[trainers]")
    transformers = pytest.importorskip("transformers", reason="needs fxprop[transformers]")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    ids, labels = torch.randint(0, 50, (16, 12)), torch.randint(0, 2, (16,))
    gm, report = fxprop.transform(model, 0.25, example_kwargs={"input_ids": ids[:4], "labels": labels[:4]})
    assert report.totals.saving > 0.5
    scheduler = fxprop.KeepScheduler(gm, fxprop.schedules.Linear(1.0, 0.25, steps=3))

    class KeepCallback(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            scheduler.step()

    before = gm.bert.encoder.layer[0].output.dense.weight.detach().clone()
    trainer = transformers.Trainer(
        model=gm,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=4,
            report_to=[],
            use_cpu=True,
            save_steps=4,
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)],
        callbacks=[KeepCallback()],
    )
    result = trainer.train()
    assert torch.isfinite(torch.tensor(result.training_loss))
    assert scheduler.get_last_keep() == [0.25]
    assert not torch.equal(before, gm.bert.encoder.layer[0].output.dense.weight)
    # what it saved is an ordinary checkpoint of an ordinary model
    saved = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-4")
    state = saved.state_dict()
    assert all(torch.equal(state[key], value) for key, value in gm.state_dict().items())


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning", reason="needs fxprop[trainers]")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = fxprop.transform(classifier(), KEEP, (torch.randn(4, 8),))[0]

        def training_step(self, batch, _):
            x, y = batch
            return F.cross_entropy(self.model(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Classifier()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=True,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, batches())
    assert_same(list(module.model.parameters()), expected())
    (checkpoint,) = tmp_path.glob("**/*.ckpt")
    again = Classifier()
    again.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"], strict=True)
    assert_same(list(again.model.parameters()), expected())
