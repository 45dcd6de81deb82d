"""A tiny model on disk, bases of what moved it, and trainers confined to them; the same steps written out by hand."""

import copy
from types import SimpleNamespace

import torch
from transformers import Trainer, TrainingArguments

from geopd.problems import character_tokenizer
from geopd.training.bases_of_runs import basis_of_run
from geopd.training.basis import Provenance, write_basis
from geopd.training.language_model import ModelShape, build_model, load_model
from geopd.training.named_parameters import named_parameters

SHAPE = ModelShape(hidden=32, layers=1, heads=2, key_value_heads=1, intermediate=48)
STEPS, LR, CLIP = 4, 1e-2, 0.5


def make_world(root):
    """A start W_t0 on disk, what came before it, and bases of every kind from the difference."""
    tokenizer = character_tokenizer()
    model = build_model(SHAPE, tokenizer, seed=0)
    model.save_pretrained(root / "base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "up_proj" not in name:  # one matrix that did not move
                left, right = (torch.randn(size, 6, generator=generator) for size in weight.shape)
                weight += 2e-3 * left @ right.T
    model.save_pretrained(root / "start")
    tokenizer.save_pretrained(root / "start")
    for kind in ("update", "mask", "random"):
        basis = basis_of_run(root / "base", root / "start", k=4, kind=kind)
        write_basis(root / f"{kind}.safetensors", basis)
    return root


def make_batches():
    """Rows of random tokens, four a step."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(2, 24, (STEPS * 4, 10), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder, **changed):
    given = {
        "output_dir": str(folder), "max_steps": STEPS, "learning_rate": LR, "weight_decay": 0.0, "max_grad_norm": CLIP,
        "lr_scheduler_type": "constant", "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "train_sampling_strategy": "sequential", "logging_steps": 2,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(**(given | changed))


def trainer_of(world, batches, folder, projection, model=None, **changed):
    model = projection.prepare(model if model is not None else load_model(world / "start"))
    trainer = Trainer(model=model, args=arguments(folder, **changed), train_dataset=batches)
    projection.attach(trainer)
    return trainer


def trained(world, batches, folder, projection, **changed):
    trainer = trainer_of(world, batches, folder, projection, **changed)
    trainer.train()
    return trainer


def begin(projection, model, optimiser):
    """What the trainer does when training begins."""
    from geopd.training.confinement import Confinement

    Confinement(projection).on_train_begin(None, SimpleNamespace(global_step=0), None, model=model, optimizer=optimiser)


def plain_loop(world, batches, optimiser_of, constrain, trained_names, lr=LR, steps=STEPS):
    """The same steps by hand: all else frozen, gradients clipped to the norm of what is trained, then constrained."""
    model = load_model(world / "start")
    weights = {name: p.parameter for name, p in named_parameters(model).items()}
    for name, weight in weights.items():
        weight.requires_grad_(name in trained_names)
    chosen = {name: weights[name] for name in trained_names}
    optimiser = optimiser_of(list(chosen.values()), lr)
    for step in range(steps):
        optimiser.zero_grad()
        ids = torch.stack([row["input_ids"] for row in batches[step * 4 : step * 4 + 4]])
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(chosen.values(), CLIP)
        with torch.no_grad():
            for name, weight in chosen.items():
                constrain(name, weight)
        optimiser.step()
    return {name: weight.detach() for name, weight in weights.items()}


def adam(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)


def sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr)


def start_of(world):
    return {name: p.parameter.detach() for name, p in named_parameters(load_model(world / "start")).items()}


def merged_state_dict(model):
    """PEFT's own merge, of a copy."""
    return copy.deepcopy(model).merge_and_unload().state_dict()


def provenance(**changed):
    given = {
        "kind": "update", "k": 4, "step": None, "origin": "a", "origin_digest": "1", "tuned": "b", "tuned_digest": "2",
        "matrices": ("layers",),
    }  # fmt: skip
    return Provenance(**(given | changed))
