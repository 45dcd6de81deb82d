"""``run.json`` names everything in which a run differs from its paradigm's baseline, and nothing else."""

import pytest

from geopd.training import parse_config
from geopd.training.bases_of_runs import basis_of_run
from geopd.training.basis import write_basis
from geopd.training.run_record import tags_of
from tiny_runs import save_model, settings


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "student", 0)
    save_model(folder / "teacher", 1)
    return folder


@pytest.mark.parametrize(
    ("paradigm", "given", "tags"),
    [
        ("opd", {}, {}),
        ("rlvr", {}, {}),
        ("sft", {}, {}),
        ("opd", {"token_selection": "random", "rho": 0.25}, {"token_selection": "random", "rho": "0.25"}),
        ("opd", {"rollouts": "teacher"}, {"rollouts": "teacher"}),
        ("opd", {"divergence": "forward_kl"}, {"divergence": "forward_kl"}),
        ("mix", {"alpha": 0.05}, {"alpha": "0.05"}),
        ("mix", {"alpha": 0.05, "normalise": True}, {"alpha": "0.05", "normalise": "true"}),
        ("mix", {"alpha": 1.0, "normalise": True}, {"alpha": "1", "normalise": "true"}),
    ],
)
def test_the_signal(paradigm, given, tags, models, tmp_path):
    assert tags_of(parse_config(paradigm, settings=settings(paradigm, models, tmp_path, **given))) == tags


@pytest.mark.parametrize(
    ("kind", "k", "mode", "scale", "tags"),
    [
        ("update", 2, "adapter", "sqrt", {"projection": "update", "k": "2", "mode": "adapter", "lr_scale": "sqrt"}),
        ("random", 2, "gradient", "none", {"projection": "random", "k": "2", "mode": "gradient"}),
        ("mask", 2, "mask", "none", {"projection": "mask", "mode": "mask"}),
    ],
)
def test_the_projection(kind, k, mode, scale, tags, models, tmp_path):
    basis = basis_of_run(models / "student", models / "teacher", k=k, kind=kind)
    path = write_basis(tmp_path / "basis.safetensors", basis)
    projection = {"basis": str(path), "mode": mode, "lr_scale": scale}
    given = settings("sft", models, tmp_path, projection=projection, weight_decay=0.0)
    assert tags_of(parse_config("sft", settings=given)) == tags


def test_one_signal_alone_is_a_mixture_only_at_unit_size(models, tmp_path):
    given = settings("mix", models, tmp_path, alpha=1.0)
    with pytest.raises(ValueError, match=r"alpha=1\.0 is no mixture: train opd for 1 and rlvr for 0"):
        parse_config("mix", settings=given)
