"""The basis of a run against numpy's SVD, its controls against their laws, and the file against every damage."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_on_disk import down_name, moved, q_name, save_run, save_tensors, small_weights, write_run_json
from geopd.checkpoints import checkpoint_digest
from geopd.training.bases_of_runs import basis_of_run, haar
from geopd.training.basis import Basis, Provenance, pack_mask, read_basis, unpack_mask, write_basis

Q, DOWN = "layers.0.self_attn.q_proj", "layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An fp32 origin and a run of two steps from it."""
    root = tmp_path_factory.mktemp("basis")
    weights = {name: tensor.float() for name, tensor in small_weights().items()}
    save_tensors(root / "anchor", weights)
    run = save_run(root / "opd", weights, [10, 20])
    write_run_json(run, origin={"path": "../anchor", "digest": checkpoint_digest(root / "anchor")})
    return root


def update_of(root, step, name):
    before, after = (
        load_file(root / part / "model.safetensors")[name] for part in ("anchor", f"opd/checkpoint-{step}")
    )
    return before.double(), after.double() - before.double()


def projector(V):
    V = np.asarray(V, dtype=np.float64)
    return V @ V.T


@pytest.mark.parametrize(("kind", "part"), [("update", 1), ("origin", 0)])
def test_columns_span_the_leading_right_singular_vectors(kind, part, world):
    basis = basis_of_run(world / "anchor", world / "opd", step=10, k=4, kind=kind)
    assert set(basis.names) == {f"layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")}
    for name, stored in ((Q, q_name()), (DOWN, down_name())):
        matrix, D = update_of(world, 10, stored)[part], update_of(world, 10, stored)[1]
        _, _, Vh = np.linalg.svd(matrix.numpy())
        V = basis.vectors[name]
        assert V.dtype == torch.float32
        assert np.abs(projector(V) - projector(Vh[:4].T)).max() < 1e-5
        inside = float(((D @ torch.from_numpy(Vh[:4].T)) ** 2).sum() / (D**2).sum())
        assert basis.provenance.energy[name] == pytest.approx(inside, rel=1e-6)


def test_provenance_says_where_it_comes_from(world):
    provenance = basis_of_run("origin", world / "opd", k=4).provenance
    assert (provenance.kind, provenance.k, provenance.step, provenance.seed) == ("update", 4, 20, None)
    assert provenance.origin == str(world / "anchor")
    assert provenance.origin_digest == checkpoint_digest(world / "anchor")
    assert provenance.tuned_digest == checkpoint_digest(world / "opd" / "checkpoint-20")
    assert provenance.left_out == {}


def test_a_low_rank_update_gives_fewer_columns_and_a_still_matrix_none(tmp_path):
    weights = {name: tensor.double() for name, tensor in small_weights().items()}
    save_tensors(tmp_path / "a", weights)
    left, right = torch.eye(24, 2, dtype=torch.float64), torch.eye(16, 2, dtype=torch.float64)
    changed = weights | {q_name(): torch.where((left @ right.T) != 0, 1.0, weights[q_name()])}
    save_tensors(tmp_path / "b", changed)
    basis = basis_of_run(tmp_path / "a", tmp_path / "b", k=8)
    assert {name: V.shape[1] for name, V in basis.vectors.items()} == {Q: 2}
    for kind in ("random", "origin"):  # a control is no larger than what it controls for
        control = basis_of_run(tmp_path / "a", tmp_path / "b", k=8, kind=kind)
        assert {name: V.shape for name, V in control.vectors.items()} == {Q: (16, 2)}
    assert set(basis.provenance.left_out.values()) == {"did not move"}
    assert len(basis.provenance.left_out) == 3


def test_a_random_basis_is_haar_and_follows_seed_and_name():
    """Haar: E[V V^T] = (K/n) I and E[V] = 0; without the sign fix of QR the mean of V's diagonal is not 0."""
    draws = torch.stack([haar(6, 2, seed, "w") for seed in range(4000)])
    assert torch.allclose(draws.mT @ draws, torch.eye(2, dtype=torch.float64).expand(4000, 2, 2))
    assert float((draws @ draws.mT).mean(0).sub(torch.eye(6) / 3).abs().max()) < 0.02
    assert float(draws.mean(0).abs().max()) < 5 / (6 * 4000) ** 0.5
    assert torch.equal(haar(6, 2, 1, "w"), haar(6, 2, 1, "w"))
    assert not torch.equal(haar(6, 2, 1, "w"), haar(6, 2, 2, "w"))
    assert not torch.equal(haar(6, 2, 1, "w"), haar(6, 2, 1, "v"))


def test_a_random_basis_covers_the_matrices_that_moved(world):
    update, random = (basis_of_run(world / "anchor", world / "opd", k=4, kind=kind) for kind in ("update", "random"))
    assert {n: V.shape for n, V in update.vectors.items()} == {n: V.shape for n, V in random.vectors.items()}
    assert random.provenance.seed == 0
    assert torch.equal(random.vectors[Q].double(), haar(16, 4, 0, Q).float().double())


def test_a_mask_is_what_changed_visibly_in_bf16(world):
    basis = basis_of_run(world / "anchor", world / "opd", step=10, kind="mask")
    before, D = update_of(world, 10, q_name())
    after = (before + D).bfloat16().double()
    before = before.bfloat16().double()
    expected = (after - before).abs() > 1e-3 * torch.maximum(before.abs(), after.abs())
    assert torch.equal(basis.mask(Q), expected)
    assert basis.vectors == {}
    assert basis.provenance.k is None


def test_masks_of_any_width_survive_packing(tmp_path):
    generator = torch.Generator().manual_seed(0)
    masks = {f"w{n}": torch.rand(5, n, generator=generator) < 0.5 for n in (1, 7, 8, 9, 40)}
    for mask in masks.values():
        assert torch.equal(unpack_mask(pack_mask(mask), mask.shape[1]), mask)
    widths = {name: mask.shape[1] for name, mask in masks.items()}
    basis = Basis({}, provenance(kind="mask", widths=widths), {name: pack_mask(mask) for name, mask in masks.items()})
    again = read_basis(write_basis(tmp_path / "mask.safetensors", basis))
    assert all(torch.equal(again.mask(name), mask) for name, mask in masks.items())
    assert (tmp_path / "mask.safetensors").stat().st_size < 2000


def provenance(**changed):
    given = {
        "kind": "update", "k": 2, "step": 3, "origin": "a", "origin_digest": "1", "tuned": "b", "tuned_digest": "2",
        "matrices": ("layers",),
    }  # fmt: skip
    return Provenance(**(given | changed))


def test_a_file_gives_back_what_was_written(world, tmp_path):
    basis = basis_of_run("origin", world / "opd", k=4, matrices=("attention",))
    again = read_basis(write_basis(tmp_path / "deeper" / "b.safetensors", basis))
    assert again.provenance == basis.provenance
    assert all(torch.equal(again.vectors[name], V) for name, V in basis.vectors.items())
    assert set(again.names) == {f"layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert [path.name for path in (tmp_path / "deeper").iterdir()] == ["b.safetensors"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "best"}, r"--kind best: use one of update, random, origin, mask"),
        ({"k": 0}, r"--k 0"),
        ({"step": 11}, r"--step 11: .*opd has no such step; it has 10, 20"),
        ({"matrices": ("nothing*",)}, r"--matrices nothing\*: selects none of the 6 tensors"),
    ],
)
def test_unusable_options_are_named(options, match, world):
    with pytest.raises(ValueError, match=match):
        basis_of_run(world / "anchor", world / "opd", **options)


def test_unusable_runs_are_named(world, tmp_path):
    with pytest.raises(ValueError, match=r"none of the 4 matrices moved .*name a later step"):
        basis_of_run(world / "anchor", world / "anchor")
    with pytest.raises(ValueError, match="a base is one checkpoint, and this folder holds checkpoint-10"):
        basis_of_run(world / "opd", world / "opd")
    weights = small_weights()
    weights[q_name()][0, 0] = float("nan")
    save_tensors(tmp_path / "nan", weights)
    with pytest.raises(
        ValueError, match=r"nan/model.safetensors: tensor model.layers.0.self_attn.q_proj.weight: not finite"
    ):
        basis_of_run(world / "anchor", tmp_path / "nan")
    run = save_run(tmp_path / "opd", small_weights(), [10])
    save_tensors(tmp_path / "anchor", moved(small_weights(), 1e-3))
    write_run_json(run, origin={"path": "../anchor", "digest": "0" * 32})
    with pytest.raises(ValueError, match=r"not the checkpoint that .*opd started from"):
        basis_of_run("origin", run)


def test_damaged_files_are_named(tmp_path):
    path, V = tmp_path / "b.safetensors", torch.eye(6)[:, :2].contiguous()
    with pytest.raises(ValueError, match=r"b.safetensors: no such basis file; make one with `geopd basis"):
        read_basis(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_basis(path)
    save_file({"w": V}, path)
    with pytest.raises(ValueError, match="safetensors, but not a basis"):
        read_basis(path)
    for entry, match in (({"version": 9}, "version 9"), ({"version": 1}, "provenance cannot be read")):
        save_file({"w": V}, path, metadata={"geopd_basis": json.dumps(entry | {"matrices": []})})
        with pytest.raises(ValueError, match=match):
            read_basis(path)


def test_a_place_that_cannot_be_written_is_named_and_nothing_is_left_there(world, tmp_path, monkeypatch):
    basis = basis_of_run("origin", world / "opd", k=4, matrices=("attention",))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"folder: a folder; name the file to write in it"):
        write_basis(tmp_path / "folder", basis)
    with pytest.raises(ValueError, match=r"file is a file, and no folder can be made there"):
        write_basis(tmp_path / "file" / "b.safetensors", basis)
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)
        with pytest.raises(ValueError, match=r"is not writable; name another place"):
            write_basis(tmp_path / "b.safetensors", basis)

    def full(_tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("geopd.training.basis.save_file", full)
    with pytest.raises(ValueError, match=r"b.safetensors: cannot be written \(no space left\); make room"):
        write_basis(tmp_path / "b.safetensors", basis)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}
    assert not any((tmp_path / "folder").iterdir())


@pytest.mark.parametrize(
    ("tensor", "changed", "match"),
    [
        (2 * torch.eye(6, 2), {}, "w: columns are not orthonormal"),
        (torch.full((6, 2), float("nan")), {}, "not orthonormal"),
        (torch.eye(6, 2).bfloat16(), {}, r"torch.bfloat16 of shape \(6, 2\), where V is float32"),
        (torch.eye(2, 6), {}, "with K from 1 to n"),
        (torch.eye(6, 2), {"kind": "other"}, "kind 'other' is none of"),
        (torch.eye(6, 2), {"kind": "mask"}, "no packed mask of None columns"),
    ],
)
def test_what_is_no_basis_is_neither_written_nor_read(tensor, changed, match, tmp_path):
    mask = changed.get("kind") == "mask"
    basis = Basis({} if mask else {"w": tensor}, provenance(**changed), {"w": tensor} if mask else {})
    with pytest.raises(ValueError, match=match):
        write_basis(tmp_path / "b.safetensors", basis)
    with pytest.raises(ValueError, match="holds no matrix"):
        write_basis(tmp_path / "b.safetensors", Basis({}, provenance()))
