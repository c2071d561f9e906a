"""LACELoss in people's own tools, each as its users would write it; the witness is the same step written out in torch.

The packages are the extra `integrations`. Models are tiny and random, nothing is downloaded.
"""

import copy
import functools
import operator

import numpy as np
import pytest
import torch

from lace_loss import ext
from lace_loss.ext.torch import LACELoss, lace_loss

pytestmark = pytest.mark.filterwarnings("ignore")  # the tools' own

# 8 samples in 4 micro-batches; the ignored ones fall unevenly: the means of micro-batches do not average to the mean.
TARGET = torch.tensor([0, -100, -100, -100, 1, 2, -100, 1])
INPUT = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
BATCHES = list(zip(INPUT.split(2), TARGET.split(2), strict=True))


def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(6, 3)


def stepped(model, *batches):
    """`model` after one step of gradient descent on the mean loss of each batch."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for input, target in batches:
        optimizer.zero_grad()
        lace_loss(model(input), target).backward()
        optimizer.step()
    return model


def assert_same_weights(one, other):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # float32 sums in another order


def test_a_hugging_face_trainer_accumulates_micro_batches_into_the_gradient_of_the_whole(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear()

        def forward(self, x, labels=None):
            return {"logits": self.linear(x)}

    criterion = LACELoss()

    def compute_loss(outputs, labels, num_items_in_batch=None):
        return criterion(outputs["logits"], labels, normalizer=num_items_in_batch)

    model = Classifier()
    expected = stepped(model.linear, (INPUT, TARGET))
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            tmp_path,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            max_steps=1,
            max_grad_norm=0,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=[{"x": x, "labels": y} for x, y in zip(INPUT, TARGET, strict=True)],
        compute_loss_func=compute_loss,
        optimizers=(torch.optim.SGD(model.parameters(), lr=1.0), None),
    )
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, factor=1.0)
    trainer.train()
    assert_same_weights(model.linear, expected)


def test_dask_adds_up_the_tallies_of_a_folder_s_parts(tmp_path):
    dask = pytest.importorskip("dask")
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(700, 12)).astype(np.float32), rng.integers(0, 12, 700)
    for i, rows in enumerate(np.array_split(np.arange(700), 6)):
        np.save(tmp_path / f"logits-{i}.npy", logits[rows])
        np.save(tmp_path / f"target-{i}.npy", target[rows])

    def of_part(path):
        tally = ext.Tally()
        tally.add(np.load(path, mmap_mode="r"), np.load(path.with_name(path.name.replace("logits", "target"))))
        return tally

    parts = [dask.delayed(of_part)(path) for path in tmp_path.glob("logits-*.npy")]
    total = dask.delayed(functools.reduce)(operator.add, parts)
    expected = ext.evaluate(logits, target)
    for scheduler, workers in (("synchronous", 1), ("threads", 2), ("processes", 2)):
        assert total.compute(scheduler=scheduler, num_workers=workers).figures() == expected


def test_a_lightning_module_trains_as_the_plain_loop():
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.linear, self.loss = linear(), LACELoss()

        def training_step(self, batch, _):
            input, target = batch
            return self.loss(self.linear(input), target)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    batches = [BATCHES[0], BATCHES[2], BATCHES[3]]  # the second is ignored altogether: its mean is NaN
    model = Classifier()
    expected = stepped(model.linear, *batches)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))
    assert_same_weights(model.linear, expected)


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_timm_s_mixed_targets_give_the_mixture_of_the_two_losses(mix):
    data = pytest.importorskip("timm.data")
    torch.manual_seed(0)
    alphas = {"mixup_alpha": float(mix == "mixup"), "cutmix_alpha": float(mix == "cutmix")}
    mixing = data.Mixup(**alphas, label_smoothing=0.0, num_classes=3)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 3))
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.1), LACELoss()
    classes = torch.tensor([0, 1, 2, 1])
    for _ in range(3):
        images, target = mixing(torch.randn(4, 3, 8, 8), classes)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(images)
            loss = criterion(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        share = target[0, 0]  # of its own class in the first image, which is mixed with the last
        own, other = lace_loss(logits.float(), classes), lace_loss(logits.float(), classes.flip(0))
        torch.testing.assert_close(loss, share * own + (1 - share) * other)


def test_a_loss_scale_saves_the_gradients_that_float16_would_lose():
    """At margin 10 the mean's gradient is 6e-9 at most; the smallest float16 is 6e-8."""
    weights = torch.eye(3) * 10
    scaled = {}
    for scale in (1.0, 2.0**16):
        model = torch.nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            model.weight.copy_(weights)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with torch.autocast("cpu", dtype=torch.float16):
            logits = model(torch.eye(3))
            loss = LACELoss()(logits, torch.arange(3))
        assert logits.dtype == torch.float16
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaled[scale] = model.weight.grad
    exact = weights.clone().requires_grad_()
    lace_loss(exact, torch.arange(3)).backward()
    assert not torch.allclose(scaled[1.0], exact.grad, rtol=0.01, atol=0)
    torch.testing.assert_close(scaled[2.0**16], exact.grad, rtol=2.0**-9, atol=0)


def test_accelerate_accumulates_micro_batches_into_the_gradient_of_the_whole():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=len(BATCHES))
    model, criterion = linear(), LACELoss()
    expected = stepped(model, (INPUT, TARGET))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    count = sum((target != criterion.ignore_index).sum() for _, target in BATCHES)
    for input, target in BATCHES:
        with accelerator.accumulate(model):
            # backward divides by the number of micro-batches
            loss = criterion(model(input), target, normalizer=count / accelerator.gradient_accumulation_steps)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(model, expected)
