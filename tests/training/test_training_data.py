"""Prompts and demonstrations from every kind of source, and what a bad row, file or name is told."""

import json
import logging

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from geopd.problems import distinct_problems, parse_prompt, split_of, verify
from geopd.training.data import load_demonstrations, load_prompts


def dapo(question, answer):
    """A row in the schema of dapo-math-17k."""
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": question}],
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": question},
    }


DAPO = [dapo("2+2?", "4"), dapo("3+3?", "6"), dapo("2+2?", "4"), dapo("1+1?", "2")]
DAPO_PROMPTS = [[{"role": "user", "content": question}] for question in ("2+2?", "3+3?", "1+1?")]


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_the_dapo_schema_gives_prompts_answers_and_keeps_other_columns(tmp_path, suffix, caplog):
    with caplog.at_level(logging.WARNING):
        found = load_prompts(write(tmp_path / f"rows{suffix}", DAPO), needs_answer=True)
    assert found["prompt"][:] == DAPO_PROMPTS
    assert found["answer"][:] == ["4", "6", "2"]
    assert found["data_source"][:] == ["math_dapo"] * 3
    assert found["reward_model"][0] == {"ground_truth": "4", "style": "rule"}
    assert "1 of 4 rows are duplicates, dropped" in caplog.text


@pytest.mark.parametrize("how", ["files", "saved", "saved splits"])
def test_folders_of_files_and_saved_data_sets_read_alike(tmp_path, how):
    folder = tmp_path / "data"
    if how == "files":
        (folder / "deeper").mkdir(parents=True)
        write(folder / "deeper" / "a.parquet", DAPO[:2])
        write(folder / "z.jsonl", DAPO[2:])
    elif how == "saved":
        Dataset.from_list(DAPO).save_to_disk(folder)
    else:
        DatasetDict(train=Dataset.from_list(DAPO), test=Dataset.from_list(DAPO[:1])).save_to_disk(folder)
        assert len(load_prompts(folder, split="test")) == 1
        with pytest.raises(ValueError, match=r"has no split 'dev', only train, test: pass one of these"):
            load_prompts(folder, split="dev")
    found = load_prompts(folder)
    assert found["prompt"][:] == DAPO_PROMPTS
    assert found["answer"][:] == ["4", "6", "2"]


def test_files_called_after_splits_are_not_mixed(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", DAPO[:1])
    write(tmp_path / "train-00001-of-00002.parquet", DAPO[1:2])
    write(tmp_path / "test-00000-of-00001.parquet", DAPO[3:])
    assert load_prompts(tmp_path)["answer"][:] == ["4", "6"]
    assert load_prompts(tmp_path, split="test")["answer"][:] == ["2"]
    with pytest.raises(
        ValueError, match=r"has no file that starts with 'validation', only test-00000-of-00001.parquet"
    ):
        load_prompts(tmp_path, split="validation")


def test_trl_columns_text_and_messages(tmp_path):
    plain = write(tmp_path / "plain.jsonl", [{"prompt": "a", "answer": 1, "level": 3}, {"prompt": "b", "answer": None}])
    found = load_prompts(plain)
    assert found[:] == {"prompt": ["a", "b"], "level": [3, None], "answer": ["1", None]}
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    chats = write(tmp_path / "chats.jsonl", [{"messages": turns}, {"messages": turns[:2]}, {"messages": turns[1:]}])
    found = load_prompts(chats)
    assert found["prompt"][:] == [turns[:2], turns[1:2]]
    assert "answer" not in found.column_names


WRITTEN = ["3", "2.5", "2.50", "3.0", "1e-05", "0.00001", "-7", "9007199254740993", "99999999999999999999999"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("place", ["answer", "reward_model.ground_truth", "meta.truth"])
def test_numbers_of_json_become_answers_as_they_are_written(tmp_path, suffix, place):
    column, _, field = place.partition(".")
    rows = [
        f'{{"prompt": "{i}", "{column}": ' + (f'{{"{field}": {text}}}' if field else text) + "}"
        for i, text in enumerate(WRITTEN)
    ]
    path = tmp_path / f"r{suffix}"
    path.write_text("\n".join(rows) if suffix == ".jsonl" else f"[{', '.join(rows)}]")
    found = load_prompts(path, answer_column="meta.truth" if column == "meta" else None)
    assert found["answer"][:] == WRITTEN


def test_an_integer_answer_beside_a_decimal_one_is_what_a_right_response_says(tmp_path):
    from geopd.training.rewards import reward_functions

    rows = load_prompts(write(tmp_path / "r.jsonl", [{"prompt": "a", "answer": 3}, {"prompt": "b", "answer": 2.5}]))
    exact = reward_functions(["exact"])[0]
    assert exact(rows["prompt"][:], ["Answer: 3", "Answer: 2.5"], answer=rows["answer"][:]) == [1.0, 1.0]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("kind", "values", "texts"),
    [
        (pa.int64(), [3, -7, 9007199254740993], ["3", "-7", "9007199254740993"]),
        (pa.float64(), [3.0, 2.5, -0.125, 2.0**53, 1e-5], ["3", "2.5", "-0.125", "9007199254740992.0", "1e-05"]),
        (pa.float32(), [0.1, 3.0, None], ["0.1", "3", None]),
    ],
)
def test_typed_numbers_become_the_shortest_text_that_reads_back(tmp_path, nested, kind, values, texts):
    answers = pa.array(values, kind)
    if nested:
        answers = pa.StructArray.from_arrays([answers], ["truth"])
    pq.write_table(pa.table({"prompt": [str(i) for i in range(len(values))], "a": answers}), tmp_path / "r.parquet")
    assert load_prompts(tmp_path / "r.parquet", answer_column="a.truth" if nested else "a")["answer"][:] == texts


def test_a_typed_answer_that_is_no_number_is_told(tmp_path):
    pq.write_table(pa.table({"prompt": ["a"], "answer": [float("nan")]}), tmp_path / "r.parquet")
    with pytest.raises(ValueError, match="row 1: the answer in answer is 'nan'; give one text or number"):
        load_prompts(tmp_path / "r.parquet")


def test_rows_that_differ_in_a_column_for_a_reward_of_ones_own_are_all_kept(tmp_path, caplog):
    tests = [{"tests": ["f(1)"]}, {"tests": ["f(2)"]}, {"tests": ["f(1)"]}]
    for beside in ({}, {"answer": "4"}, {"reward_model": {"ground_truth": "4"}}):
        rows = [{"prompt": "a", **beside, **extra} for extra in tests]
        with caplog.at_level(logging.WARNING):
            assert load_prompts(write(tmp_path / "r.jsonl", rows))["tests"][:] == [["f(1)"], ["f(2)"]]
        assert "1 of 3 rows are duplicates, dropped\n" in caplog.text
        caplog.clear()
    nested = [{"prompt": "a", "reward_model": {"ground_truth": "4", "style": style}} for style in "xyx"]
    assert len(load_prompts(write(tmp_path / "r.jsonl", nested))) == 2


def test_identifiers_make_no_row_distinct_and_are_named(tmp_path, caplog):
    """Copies numbered at the top, inside an object and by pandas, as of dapo-math-17k."""
    rows = [
        {**dapo(question, "4"), "extra_info": {"index": f"{i}", "split": "train"}, "uniqueId": i, "problem_id": f"p{i}"}
        for i, question in enumerate(["2+2?", "1+3?"] * 50)
    ]
    table = pa.Table.from_pylist(rows).append_column("__index_level_0__", pa.array(range(100)))
    pq.write_table(table, tmp_path / "r.parquet")
    with caplog.at_level(logging.WARNING):
        found = load_prompts(tmp_path / "r.parquet")
    assert [prompt[0]["content"] for prompt in found["prompt"]] == ["2+2?", "1+3?"]
    assert [info["index"] for info in found["extra_info"]] == ["0", "1"]
    assert "98 of 100 rows are duplicates, dropped; not compared: " in caplog.text
    for name in ("extra_info.index", "uniqueId", "problem_id", "__index_level_0__"):
        assert name in caplog.text.partition("not compared")[2]


@pytest.mark.parametrize("name", ["answer_index", "task_id", "tests_idx", "ids", "valid", "correctIndex", "level"])
def test_what_only_sounds_like_an_identifier_is_compared(tmp_path, name):
    rows = [{"prompt": "a", "answer": "1", name: n} for n in (0, 1, 1)]
    assert load_prompts(write(tmp_path / "r.jsonl", rows))[name][:] == [0, 1]


def test_an_answer_that_another_column_replaces_makes_no_row_distinct(tmp_path):
    rows = [{"prompt": "a", "solution": "1", "answer": str(n)} for n in range(3)]
    assert load_prompts(write(tmp_path / "r.jsonl", rows), answer_column="solution")["answer"][:] == ["1"]


def test_columns_of_any_type_are_compared_as_stored(tmp_path):
    """Bytes and dates fit no JSON, and an image need not be one that can be decoded."""
    from datetime import date

    from datasets import Features, Image, Value

    table = pa.table(
        {
            "prompt": ["a"] * 4,
            "raw": [b"x", b"x", b"y", b"y"],
            "day": [date(2025, 1, 1)] * 3 + [date(2025, 1, 2)],
            "image": [{"bytes": b"no image", "path": None}] * 4,
        }
    )
    features = Features(prompt=Value("string"), raw=Value("binary"), day=Value("date32"), image=Image())
    Dataset(table.cast(features.arrow_schema)).save_to_disk(tmp_path / "saved")
    assert load_prompts(tmp_path / "saved").select_columns("raw")["raw"][:] == [b"x", b"y", b"y"]


def test_another_column_of_answers_can_be_named(tmp_path):
    rows = write(tmp_path / "r.jsonl", [{"prompt": "a", "solution": "x", "meta": {"truth": 0.5}, "answer": "wrong"}])
    assert load_prompts(rows, answer_column="solution")["answer"][:] == ["x"]
    assert load_prompts(rows, answer_column="meta.truth")["answer"][:] == ["0.5"]
    for name in ("nothing", "meta.nothing"):
        with pytest.raises(
            ValueError, match=rf"no column {name}, only prompt, solution, meta, answer: pass answer_col"
        ):
            load_prompts(rows, answer_column=name)


def test_one_prompt_with_two_answers_is_kept_twice_and_told(tmp_path, caplog):
    rows = write(tmp_path / "r.jsonl", [{"prompt": "a", "answer": "1"}, {"prompt": "a", "answer": "2"}])
    with caplog.at_level(logging.WARNING):
        assert len(load_prompts(rows)) == 2
    assert "1 prompts come again with another answer or column; all are kept" in caplog.text


def test_limit_takes_the_first_or_a_seeded_draw(tmp_path):
    rows = write(tmp_path / "r.jsonl", [{"prompt": str(i), "answer": str(i)} for i in range(50) for _ in range(2)])
    assert load_prompts(rows, limit=3)["prompt"][:] == ["0", "1", "2"]
    drawn = load_prompts(rows, limit=20, seed=1)["prompt"][:]
    assert drawn == load_prompts(rows, limit=20, seed=1)["prompt"][:]
    assert drawn != load_prompts(rows, limit=20, seed=2)["prompt"][:]
    assert len(set(drawn)) == 20
    assert len(load_prompts(rows, limit=1000)) == 50
    with pytest.raises(ValueError, match="limit=0: pass the number of rows"):
        load_prompts(rows, limit=0)


def test_keys_that_come_late_and_many_rows_make_one_table(tmp_path):
    rows = [{"prompt": f"p{i}"} for i in range(10_001)]
    rows[0]["extra"], rows[10_000]["answer"], rows[10_000]["extra"] = {"a": 1}, "late", {"a": 2, "b": "x"}
    found = load_prompts(write(tmp_path / "r.jsonl", rows))
    assert len(found) == 10_001
    assert found[10_000] == {"prompt": "p10000", "extra": {"a": 2, "b": "x"}, "answer": "late"}
    assert found[0] == {"prompt": "p0", "extra": {"a": 1, "b": None}, "answer": None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"r.jsonl is empty: pass a file with rows"),
        ("\n\n", "is empty"),
        ('{"prompt": "a"}\n{"prompt": }\n', r"r.jsonl, line 2: not valid JSON at column 12 .*; mend it"),
        ('{"prompt": "a"}\n\n[1]\n', r"r.jsonl, line 3: '\[1\]' is not an object"),
        (
            '{"prompt": "a", "answer": "1"}\n{"prompt": "b", "answer": 2}\n',
            r"r.jsonl, line 2: answer is a number here and text in .*line 1: write one type in every row",
        ),
        (
            '{"prompt": "a", "m": {"t": [1]}}\n{"prompt": "b", "m": {"t": ["x"]}}\n',
            r"line 2: m.t\[\] is text here and a number in .*line 1",
        ),
        ('{"prompt": "a"}\n{"prompt": [{"role": "user", "content": "b"}]}\n', "line 2: prompt is a list here and text"),
        ('{"question": "a", "solution": "1"}\n', "has no column prompt or messages, only question, solution: rename"),
        ('{"prompt": ""}\n', "row 1: prompt is an empty text; drop the row"),
        ('{"prompt": null}\n', "row 1: prompt is 'None'; give a text or a list of messages"),
        ('{"prompt": []}\n', r"row 1: prompt is '\[\]'; give a text"),
        ('{"prompt": [{"from": "human"}]}\n', "row 1: prompt holds .*from.*; a message has a role and content"),
        ('{"messages": [{"role": "assistant", "content": "b"}]}\n', "row 1: messages hold nothing but an answer"),
        ('{"prompt": "a", "answer": [1]}\n', r"row 1: the answer in answer is '\[1\]'; give one text or number"),
        ('{"prompt": "a", "answer": true}\n', "the answer in answer is 'True'"),
        ('{"prompt": "a", "size": 99999999999999999999999}\n', "r.jsonl holds values that fit no column"),
        ('{"prompt": "a"}\n{"prompt": "b", "answer": NaN}\n', "line 2: answer is nan; give a text or a finite number"),
    ],
)
def test_a_bad_file_or_row_is_named_with_its_place(tmp_path, content, message):
    (tmp_path / "r.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(tmp_path / "r.jsonl")


def test_files_that_are_not_what_they_are_called_are_told(tmp_path):
    for name, content, message in [
        ("a.json", b"[1, 2", r"a.json: not valid JSON at column 6"),
        ("b.json", b'[{"prompt": "a"},\n 3]', r"b.json, row 2: '3' is not an object"),
        ("c.parquet", b"not parquet", r"c.parquet is no readable Parquet file"),
        ("d.jsonl", b'{"prompt": "\xff"}', "d.jsonl is not UTF-8 text"),
        ("e.csv", b"prompt\na", r"e.csv: unknown kind of file; pass .jsonl, .json, .parquet"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_prompts(tmp_path / name)
    with pytest.raises(ValueError, match=r"split=test: the file .*c.parquet has no splits"):
        load_prompts(tmp_path / "c.parquet", split="test")


def test_json_lines_may_be_called_json_and_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "r.json").write_text('\ufeff{"prompt": "a"}\n{"prompt": "b"}\n', encoding="utf-8")
    assert load_prompts(tmp_path / "r.json")["prompt"][:] == ["a", "b"]


def test_missing_answers_are_told_where_they_are_needed(tmp_path):
    rows = write(tmp_path / "r.jsonl", [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": None}])
    with pytest.raises(ValueError, match=r"r.jsonl, row 2: the answer in answer is null; drop the row"):
        load_prompts(rows, needs_answer=True)
    bare = write(tmp_path / "bare.jsonl", [{"prompt": "a"}])
    assert load_prompts(bare).column_names == ["prompt"]
    with pytest.raises(
        ValueError, match=r"no column answer or reward_model.ground_truth, only prompt: pass answer_column"
    ):
        load_prompts(bare, needs_answer=True)


def test_folders_without_data_or_of_two_kinds_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"holds no .jsonl, .json, .parquet file"):
        load_prompts(tmp_path)
    write(tmp_path / "a.jsonl", [{"prompt": "a"}])
    write(tmp_path / "b.jsonl", [{"prompt": [{"role": "user", "content": "b"}]}])
    with pytest.raises(ValueError, match=r"the files a.jsonl, b.jsonl do not hold one kind of row"):
        load_prompts(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="is no whole folder of save_to_disk"):
        load_prompts(tmp_path)


@pytest.mark.parametrize("name", ["gsm8k", "absent"])
def test_a_hub_name_without_its_owner_is_told_how_to_give_it(name, monkeypatch):
    monkeypatch.setattr("geopd.training.data_files.load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match=f"no such file or folder; .* its name with the owner, OWNER/{name}"):
        load_prompts(name)


@pytest.mark.parametrize("source", ["data/absent.jsonl", "./absent", "/absent/folder", "absent.json"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(source):
    with pytest.raises(ValueError, match="no such file or folder; pass a path that exists or a hub name owner/name"):
        load_prompts(source)


def test_a_hub_name_without_a_network_says_what_to_do(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError,
        match=r"'nobody/nothing': no such file or folder here, and the hub gave .*Error: .*"
        r"or download it and pass its path",
    ):
        load_prompts("nobody/nothing")


def test_a_hub_name_is_loaded_with_its_split_and_subset(monkeypatch):
    asked = []

    def load_dataset(name, subset, *, split):
        asked.append((name, subset, split))
        return Dataset.from_list(DAPO)

    monkeypatch.setattr("geopd.training.data_files.load_dataset", load_dataset)
    assert load_prompts("owner/name", subset="all")["answer"][:] == ["4", "6", "2"]
    load_demonstrations_columns = pytest.raises(ValueError, match="owner/name lacks messages, or prompt and completion")
    with load_demonstrations_columns:
        load_demonstrations("owner/name", split="test")
    assert asked == [("owner/name", "all", "train"), ("owner/name", None, "test")]


def test_the_built_in_problem_has_prompts_answers_and_disjoint_splits():
    train = load_prompts("problem:arithmetic", limit=200, seed=3)
    assert train["prompt"][:] == [problem.prompt for problem in distinct_problems("train", 200, 3)]
    for prompt, answer in zip(train["prompt"], train["answer"], strict=True):
        assert verify(parse_prompt(prompt), f">{answer}") == 1.0
    held_out = load_prompts("problem:arithmetic", split="held_out", limit=50)
    assert {split_of(parse_prompt(prompt)) for prompt in held_out["prompt"]} == {"held_out"}


def test_the_built_in_problem_has_demonstrations_in_the_style_asked_for():
    clean = load_demonstrations("problem:arithmetic", limit=300, seed=1)
    scores = [verify(parse_prompt(p), c) for p, c in zip(clean["prompt"], clean["completion"], strict=True)]
    assert scores == [1.0] * 300
    assert clean[:] == load_demonstrations("problem:arithmetic", limit=300, seed=1)[:]
    mixed = load_demonstrations("problem:arithmetic?direct=0.5&slip=0.2", limit=1000)
    assert 400 < sum(text.startswith(">") for text in mixed["completion"]) < 600
    wrong = sum(1 - verify(parse_prompt(p), c) for p, c in zip(mixed["prompt"], mixed["completion"], strict=True))
    assert 150 < wrong < 250


@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        ("problem:geometry", None, "no such problem; the built-in ones are problem:arithmetic and problem:strings"),
        ("problem:arithmetic?slips=1", None, "unusable option slips=1; write direct=0.1 or slip=0.1"),
        ("problem:arithmetic?slip=often", None, "unusable option slip=often"),
        ("problem:arithmetic?slip=2", None, "slip=2.0 is not a probability"),
        ("problem:arithmetic", "test", "has no split 'test': use one of train, selection, held_out"),
        ("problem:strings?direct=0.5", None, "unusable option direct=0.5; write slip=0.1$"),
        ("problem:strings?slip=2", None, "slip=2.0 is not a probability"),
        ("problem:strings", "test", "data 'problem:strings' has no split 'test': use one of train, selection"),
    ],
)
def test_unusable_problems_are_told(source, split, message):
    with pytest.raises(ValueError, match=message):
        load_demonstrations(source, split=split, limit=5)


def test_prompts_of_a_problem_take_no_style():
    with pytest.raises(ValueError, match=r"unusable option slip=0.1; it takes none here"):
        load_prompts("problem:arithmetic?slip=0.1")
    with pytest.raises(ValueError, match=r"unusable option slip=0.1; it takes none here"):
        load_prompts("problem:strings?slip=0.1")


CHAT = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"prompt": "a", "completion": "b"},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"text": "all of it"},
    ],
)
def test_demonstrations_in_each_form_of_trl(tmp_path, suffix, row, caplog):
    rows = write(tmp_path / f"r{suffix}", [{**row, "id": 1}, {**row, "id": 2}])
    with caplog.at_level(logging.WARNING):
        found = load_demonstrations(rows)
    assert found[:] == {name: [value] for name, value in row.items()}
    assert "1 of 2 rows are duplicates" in caplog.text


def test_demonstrations_with_other_tools_are_other_demonstrations(tmp_path):
    rows = [{"messages": CHAT, "tools": [{"name": name}], "id": n} for n, name in enumerate("fgf")]
    found = load_demonstrations(write(tmp_path / "r.jsonl", rows))
    assert [tools[0]["name"] for tools in found["tools"]] == ["f", "g"]


def test_tools_stay_beside_their_messages_and_several_forms_need_a_choice(tmp_path):
    rows = write(tmp_path / "r.jsonl", [{"messages": CHAT, "text": "t", "tools": [{"name": "f"}]}])
    with pytest.raises(ValueError, match="columns of several forms: pass form, one of messages, text"):
        load_demonstrations(rows)
    assert load_demonstrations(rows, form="messages").column_names == ["messages", "tools"]
    assert load_demonstrations(rows, form="text")["text"][:] == ["t"]
    with pytest.raises(ValueError, match="lacks prompt and completion, it has messages, text, tools"):
        load_demonstrations(rows, form="prompt-completion")
    with pytest.raises(ValueError, match="form 'chat' is unknown: use one of messages, prompt-completion, text"):
        load_demonstrations(rows, form="chat")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": CHAT[:1]}, "row 1: messages hold no assistant's turn to learn from"),
        ({"prompt": "a", "completion": ""}, "row 1: completion is an empty text"),
        ({"prompt": "a", "completion": CHAT[1:]}, "row 1: prompt and completion must both be text or both be messages"),
    ],
)
def test_unusable_demonstrations_are_told(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        load_demonstrations(write(tmp_path / "r.jsonl", [row]))
