"""When the alarms go off, from the definition of each, and what they say."""

import pytest

from geopd.training.geometry_alarms import Alarms, AlarmWatch


def heard(alarms, looks):
    watch = AlarmWatch(alarms)
    return [watch.heed(look) for look in looks]


def test_a_stable_rank_outside_its_band_warns_once():
    found = heard(Alarms(stable_rank=(5, 60)), [{"stable_rank": value} for value in (5.0, 60.0, 61.5, 70.0, 4.0)])
    assert found[:2] == [[], []]
    assert found[2] == ["the mean stable rank 61.5 left the band 5 to 60"]
    assert found[3:] == [[], []]


def test_a_subspace_unlocks_only_after_it_was_locked():
    looks = [{}, *({"similarity_previous": value} for value in (0.2, 0.6, 0.9, 0.45, 0.9, 0.1))]
    found = heard(Alarms(unlocked_below=0.5), looks)
    assert [bool(warned) for warned in found] == [False, False, False, False, True, False, False]
    assert found[4] == ["the subspace unlocked: mean similarity to the previous look fell to 0.45, below 0.5"]


def test_updates_vanish_where_the_norm_grows_and_little_is_visible():
    looks = [
        {"visible_share": 0.02, "update_norm": 1.0},
        {"visible_share": 0.005, "update_norm": 0.9},
        {"visible_share": 0.005, "update_norm": 0.95},
    ]
    found = heard(Alarms(invisible_below=0.01), looks)
    assert found[:2] == [[], []]
    assert found[2] == [
        "updates vanish below bf16: 0.005 of the entries visibly changed, below 0.01, while the mean norm grew from "
        "0.9 to 0.95"
    ]


def test_a_growing_share_is_a_healthy_start_however_small_it_is():
    looks = [{"visible_share": 1e-4 * step, "update_norm": 0.1 * step} for step in range(5)]
    assert heard(Alarms(invisible_below=0.01), looks) == [[], [], [], [], []]


def test_one_look_says_nothing_about_growth():
    assert heard(Alarms(invisible_below=0.01), [{"visible_share": 0.001, "update_norm": 1.0}]) == [[]]


def test_updates_vanish_altogether_where_a_learning_rate_moves_nothing():
    nothing = {"visible_share": 0.0, "update_norm": 0.0}
    for learning_rate in (0.0, 2e-6):
        watch = AlarmWatch(Alarms(invisible_below=0.01))
        assert watch.heed(nothing, learning_rate) == []
        expected = [
            "updates vanish below bf16: 0 of the entries visibly changed, below 0.01, and no weight moved at a "
            "learning rate of 2e-06 (or every gradient was 0)"
        ]
        assert watch.heed(nothing, learning_rate) == (expected if learning_rate else [])
        assert watch.heed(nothing, learning_rate) == []


def test_undefined_values_raise_nothing():
    alarms = Alarms(stable_rank=(1, 2), unlocked_below=0.5, invisible_below=0.5)
    assert heard(alarms, [{}, {}]) == [[], []]


def test_unusable_conditions_are_named():
    with pytest.raises(ValueError, match="set stable_rank, unlocked_below or invisible_below"):
        Alarms(stop=True)
    for band in ((5, 5), [7, 5], 5, (1, 2, 3), ["a", "b"], [1, None], "ab", (1, float("nan")), (False, True)):
        with pytest.raises(ValueError, match="no band"):
            Alarms(stable_rank=band)
    assert Alarms(stable_rank=[5, 7])
    for name in ("unlocked_below", "invisible_below"):
        with pytest.raises(ValueError, match=f"{name}=1.5 is no share"):
            Alarms(**{name: 1.5})
        with pytest.raises(ValueError, match=f"{name}='0.5' is no share"):
            Alarms(**{name: "0.5"})
    with pytest.raises(ValueError, match="stop='false': give true or false"):
        Alarms(stable_rank=(1, 2), stop="false")
