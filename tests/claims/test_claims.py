from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from geopd.claims import CLAIMS, decide, decide_claims
from geopd.claims.comparisons import Comparison, described
from geopd.claims.endpoints import Numbers
from geopd.claims.verdicts import Statement, combine, combine_verdicts, judge, order
from geopd.results import Results, read_results
from judged_claims import judged as judged_claim
from synthetic_results import STUDY, Folder, Run

SFT, OPD, RLVR, CONTINUED = STUDY


def decided(root: Path, *runs: Run, **options: Any) -> dict[str, dict[str, Any]]:
    return {entry["id"]: entry for entry in decide(read_results(Folder(root, runs=runs, **options).write()))}


@pytest.fixture(scope="module")
def study(study_folder: Path) -> dict[str, dict[str, Any]]:
    return {entry["id"]: entry for entry in decide(read_results(study_folder))}


@pytest.fixture(scope="module")
def three_seeds(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return read_results(Folder(tmp_path_factory.mktemp("seeds") / "r", runs=seeds(*STUDY), layers=1).write())


def comparison(entry: dict[str, Any], id_: str) -> dict[str, Any]:
    return next(c for c in entry["comparisons"] if c["id"] == id_)


def seeds(*runs: Run, n: int = 3) -> tuple[Run, ...]:
    return tuple(
        replace(run, name=f"{run.name}_{seed}", seed=seed, size=run.size * (1 + 0.05 * seed))
        for run in runs
        for seed in range(n)
    )


def test_the_file_is_what_is_returned_and_has_one_entry_per_line_of_the_table(tmp_path: Path) -> None:
    root = Folder(tmp_path / "r").write()
    entries = decide_claims(root)
    assert json.loads((root / "claims.json").read_text()) == entries
    assert [e["id"] for e in entries] == [claim.id for claim in CLAIMS]
    assert [e["number"] for e in entries if e["number"][-1].isdigit()] == [f"C{i}" for i in range(1, 15)]
    assert {e["question"] for e in entries} == {"RQ1", "RQ2", "RQ3"}
    for entry in entries:
        ids = [c["id"] for c in entry["comparisons"]]
        assert len(set(ids)) == len(ids)
        speaker = comparison(entry, entry["summary"])
        assert all(entry[key] == speaker[key] for key in ("verdict", "estimate", "interval", "sentence", "seeds"))


def test_a_folder_made_to_the_papers_pattern_shows_it_and_one_seed_leaves_verdicts_open(
    study: dict[str, dict[str, Any]],
) -> None:
    baselines = [entry for entry in study.values() if "paper" in {c["id"] for c in entry["comparisons"]}]
    assert [entry["number"] for entry in baselines] == [
        "C1",
        "C1b",
        "C2",
        "C2b",
        *(f"C{i}" for i in (3, 4, 5, 6)),
        "C7b",
        "C8",
        "C9",
    ]
    for entry in baselines:
        for part in (comparison(entry, id_) for id_ in ("paper", "same_origin")):
            assert part["shows_here"] == "yes", (entry["id"], part["sentence"])
            assert part["verdict"] == "unresolved"
            assert part["beyond_null"] in ("unresolved", "no null")
            assert "one seed" in part["reason"]


def test_a_gaussian_with_the_same_ordering_is_said_to_show_it_too(study: dict[str, dict[str, Any]]) -> None:
    entries = study
    sparsity = entries["sparsity_order"]
    assert sparsity["null_shows"] == "yes"
    assert sparsity["sentence"] == "Shows here, and a Gaussian update of the same size shows it too."
    assert entries["early_lock"]["null_shows"] == "no"
    assert entries["norm_order"]["null_shows"] == "no null"


def test_both_comparisons_use_their_own_sft(study: dict[str, dict[str, Any]]) -> None:
    entry = study["sparsity_order"]
    assert comparison(entry, "paper")["runs"] == {"sft": ["sft"], "opd": ["opd"], "rlvr": ["rlvr"]}
    assert comparison(entry, "same_origin")["runs"]["sft"] == ["sft_continued"]
    assert set(comparison(entry, "same_origin")["measured"]) == {"sft_continued", "opd", "rlvr"}


def test_an_order_turned_round_is_seen(tmp_path: Path) -> None:
    swapped = (SFT, replace(OPD, size=RLVR.size), replace(RLVR, size=OPD.size))
    entry = decided(tmp_path / "r", *swapped)["sparsity_order"]
    assert entry["shows_here"] == "partly"
    assert [s["shows_here"] for s in comparison(entry, "paper")["statements"]] == ["yes", "no"]
    assert "not: OPD < RLVR" in entry["sentence"]


def test_missing_paradigms_are_not_measured_with_the_reason(tmp_path: Path) -> None:
    for entry in decided(tmp_path / "r", replace(OPD, paradigm="other", name="tuned"), layers=1).values():
        assert entry["shows_here"] == entry["verdict"] == "not measured"
        if entry["number"] in {"C10", "C11", "C12", "C13", "C14"}:
            assert "run" in entry["reason"]
        else:
            assert "the folder's paradigms: other" in entry["reason"]
        assert all(c["measured"] == {} for c in entry["comparisons"])


def test_without_sft_from_the_base_only_what_is_there_is_compared(tmp_path: Path) -> None:
    entries = decided(tmp_path / "r", OPD, RLVR)
    paper = comparison(entries["sparsity_order"], "paper")
    assert paper["shows_here"] == "partly"
    assert [s["shows_here"] for s in paper["statements"]] == ["not measured", "yes"]
    assert "no measured run for SFT" in paper["reason"]


def test_a_single_checkpoint_has_endpoints_but_no_path(tmp_path: Path) -> None:
    runs = [replace(run, steps=(None,)) for run in STUDY]
    entries = decided(tmp_path / "r", *runs)
    assert entries["sparsity_order"]["shows_here"] == "yes"
    for id_ in ("hill_trend", "early_lock"):
        assert entries[id_]["shows_here"] == "not measured"
        assert "checkpoints" in entries[id_]["reason"]


def test_entrywise_folders_leave_the_spectral_lines_unmeasured(tmp_path: Path) -> None:
    entries = decided(tmp_path / "r", *STUDY, entrywise_only=True)
    shown = {id_ for id_, entry in entries.items() if entry["shows_here"] != "not measured"}
    assert shown == {"sparsity_order", "density_order", "low_magnitude_order", "principal_order"}


def test_seeds_that_redraw_their_origins_decide(three_seeds: Results) -> None:
    entries = {entry["id"]: entry for entry in decide(three_seeds)}
    sparsity = comparison(entries["sparsity_order"], "paper")
    assert sparsity["verdict"] == "held"
    assert sparsity["reason"] is None
    for statement in sparsity["statements"]:
        low, high = statement["interval"]
        assert 0 < low < statement["estimate"] < high
    # The raw stable rank holds rounding noise: its verdict waits for the estimate without it.
    assert entries["stable_rank_path"]["verdict"] == "unresolved"
    assert "rounding noise" in entries["stable_rank_path"]["reason"]


def test_a_verdict_in_words_says_whether_it_goes_beyond_the_null(three_seeds: Results) -> None:
    entries = {entry["id"]: entry for entry in decide(three_seeds)}
    assert entries["sparsity_order"]["sentence"].startswith("Shows here, and a Gaussian update of the same size shows")
    assert "Over seeds: held" in entries["sparsity_order"]["sentence"]
    assert "beyond its null" in entries["sparsity_order"]["sentence"]
    assert entries["norm_order"]["sentence"].endswith("no null shows or denies it. Over seeds: held.")


def test_seeds_of_one_origin_are_no_replicates(three_seeds: Results) -> None:
    shared = three_seeds.runs.with_columns(origin_digest=three_seeds.runs["origin"])
    found = judged_claim(replace(three_seeds, runs=shared), "sparsity_order")["paper"]
    assert found["verdict"] == "unresolved"
    assert "share an origin" in found["reason"]
    assert found["seeds_needed"] is None


def test_the_visible_density_is_not_weighted(study: dict[str, dict[str, Any]]) -> None:
    entries = study
    density = comparison(entries["density_order"], "paper")["measured"]["opd"]
    sparsity = comparison(entries["sparsity_order"], "paper")["measured"]["opd"]
    assert density != pytest.approx(1 - sparsity, rel=1e-6)
    assert density == pytest.approx(1 - sparsity, rel=0.1)


def test_overlaps_are_read_at_the_alpha_of_the_papers_figure(study: dict[str, dict[str, Any]]) -> None:
    entries = study
    assert "alpha=0.3;" in comparison(entries["low_magnitude_order"], "paper")["quantity"]
    texts = [s["text"] for s in comparison(entries["principal_order"], "paper")["statements"]]
    assert texts[-1] == "OPD < 0.3, the overlap of a random mask"


def test_a_parameter_is_read_only_where_all_settings_agree_on_it() -> None:
    settings = ("alpha=0.3;rank=64;view=bf16", "alpha=0.3;rank=32;view=bf16")
    numbers = Numbers("principal overlap", settings=settings)
    assert (numbers.parameter("alpha"), numbers.parameter("rank"), numbers.parameter("eta")) == (0.3, None, None)
    assert Numbers("nothing measured").parameter("alpha") is None


def test_the_lock_is_compared_where_both_runs_have_started(tmp_path: Path) -> None:
    late = replace(OPD, lock=0.1)
    entry = decided(tmp_path / "r", SFT, late, RLVR)["early_lock"]
    assert entry["shows_here"] == "no"
    later = replace(SFT, steps=(60, 80, 100, 120))
    statements = comparison(decided(tmp_path / "s", later, OPD, RLVR)["early_lock"], "paper")["statements"]
    assert all(s["shows_here"] == "yes" for s in statements)


@pytest.mark.parametrize(
    ("values", "margin", "verdict"),
    [
        ([0.2, 0.21, 0.22], None, "held"),
        ([-0.2, -0.21, -0.22], None, "did not hold"),
        ([0.2, -0.2, 0.1], None, "unresolved"),
        ([0.01, 0.0, -0.01], 0.14, "held"),
        ([0.5, 0.51, 0.49], 0.14, "did not hold"),
        ([0.3, -0.3, 0.1], 0.14, "unresolved"),
    ],
)
def test_verdicts_need_the_interval_on_one_side(values: list[float], margin: float | None, verdict: str) -> None:
    judged = judge(Statement("s", dict(enumerate(values)), margin=margin), seeds=3, redrawn=True)
    assert judged["verdict"] == verdict
    level, error = 0.95 if margin is None else 0.9, stats.sem(values)
    assert judged["interval"] == pytest.approx(stats.t.interval(level, 2, sum(values) / 3, error))
    assert (judged["reason"] is None) == (verdict != "unresolved")


def test_what_the_null_explains_is_not_beyond_it() -> None:
    low, high = {0: 0.1, 1: 0.11, 2: 0.09}, {0: 0.4, 1: 0.43, 2: 0.38}
    same = judge(order("a < b", low, high, null_low=low, null_high=high), seeds=3, redrawn=True)
    assert same["explained_share"] == pytest.approx(1)
    assert same["beyond_null"] == "unresolved"
    flat = {0: 0.3, 1: 0.3, 2: 0.3}
    beyond = judge(order("a < b", low, high, null_low=flat, null_high=flat), seeds=3, redrawn=True)
    assert beyond["beyond_null"] == "yes"
    assert beyond["explained_share"] == pytest.approx(0)
    assert beyond["null_shows"] == "no"


def test_words_combine_without_hiding_what_is_missing() -> None:
    assert combine(["yes", "yes"], empty="not measured") == "yes"
    assert combine(["yes", "not measured"], empty="not measured") == "partly"
    assert combine(["no", "not measured"], empty="not measured") == "no"
    assert combine(["no null"], empty="no null") == "no null"
    assert combine_verdicts(["held", "held"]) == "held"
    assert combine_verdicts(["held", "not measured"]) == "unresolved"
    assert combine_verdicts(["held", "did not hold", "unresolved"]) == "did not hold"


@pytest.mark.parametrize(
    ("value", "sd", "margin", "verdict"),
    [
        (0.01, 0.02, 0.14, "held"),
        (0.5, 0.02, 0.14, "did not hold"),
        (0.1, 0.1, 0.14, "unresolved"),
        (0.5, 0.1, None, "held"),
    ],
)
def test_one_seed_is_judged_where_the_spread_between_seeds_is_known_from_elsewhere(
    value: float, sd: float, margin: float | None, verdict: str
) -> None:
    statement = Statement("s", {0: value}, margin=margin, yardstick=(sd, 2))
    found = described(Comparison("a", "b", "c", [statement], seeds=1))
    assert found["verdict"] == verdict
    assert found["interval"] == pytest.approx(stats.t.interval(0.95 if margin is None else 0.9, 2, value, sd))
    if verdict == "unresolved":
        assert "by the spread between seeds of the baselines" in found["reason"]
    else:
        assert f"By one seed and the baselines' spread over seeds: {verdict}." in found["sentence"]


def test_a_reason_given_with_the_numbers_keeps_a_statement_unresolved() -> None:
    statement = Statement("s", {0: 0.5, 1: 0.5, 2: 0.51}, {0: 0.1, 1: 0.1, 2: 0.1}, reason="the ground is shaky")
    found = judge(statement, seeds=3, redrawn=True)
    assert (found["verdict"], found["reason"], found["seeds_needed"]) == ("unresolved", "the ground is shaky", None)
    assert (found["beyond_null"], found["explained"]) == ("unresolved", "no null")
    empty = judge(Statement("s", {}, reason="training without projection gains nothing"), seeds=3, redrawn=True)
    assert (empty["verdict"], empty["reason"]) == ("not measured", "training without projection gains nothing")


def test_seeds_needed_are_the_most_that_an_open_statement_needs_and_null_where_one_cannot_say() -> None:
    near, far, level = (
        Statement("s", dict(enumerate(v))) for v in ((0.3, 0.1, 0.1), (-0.5, -0.01, -0.1), (0.1, -0.1, 1e-6))
    )
    needs = [judge(s, 3, redrawn=True)["seeds_needed"] for s in (near, far, level)]
    assert needs[0] < needs[1]
    assert needs[2] is None
    for statements, needed in (([near, far], needs[1]), ([near, far, level], None)):
        assert described(Comparison("a", "b", "c", statements, seeds=3, redrawn=True))["seeds_needed"] == needed
