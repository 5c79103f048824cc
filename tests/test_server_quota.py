"""`kvik serve` with two keys: one floods, the other keeps its prefixes; what each is told, and what nobody is."""

import hashlib
import json

import pytest

pytest.importorskip("fastapi", reason="pip install 'kvik[serve]'")

from kvik.engine.quota import Quota
from kvik.models.model import Model, load
from kvik.server.keys import Keys
from kvik.server.tenants import MOST, Tenants
from served import save_tiny, serving

KEYS = Keys.of(["alice", "bob"])
MEMORY = (1 << 20) + (1 << 16)
QUOTA = 21 * 16384  # bytes of 21 blocks of 32 tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(str(save_tiny(tmp_path_factory.mktemp("tiny"))), weights="f32")


def complete(server, key, text, **options):
    status, _, answer = server.send(
        "/v1/completions", {"prompt": text, "max_tokens": 1, "temperature": 0, **options}, key=key
    )
    return status, answer


def known(server, key, text):
    """(how many tokens of a prompt were known, the answer's id)."""
    status, answer = complete(server, key, text)
    assert status == 200, answer
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"], answer["id"]


def why(server, key, id):
    return server.send(f"/kvik/requests/{id}", key=key)[2]["prompts"][0]["why"]


def figures(server, key="bob"):
    text = server.send("/metrics", key=key)[2]
    return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))}


WARM = [chr(ord("A") + at) * 225 for at in range(3)]


def flood(server, key):
    """Prompts of ten times the memory, sixteen at a time."""
    for start in range(0, 160, 16):
        texts = [f"{start + at:04}" * 65 for at in range(16)]
        assert complete(server, key, texts, max_tokens=4)[0] == 200


@pytest.mark.parametrize(("apart", "quota"), [(True, None), (True, Quota(QUOTA, 2)), (False, None)])
def test_a_flood_of_one_key_leaves_anothers_hits_where_they_were(model, apart, quota):
    with serving(model, memory=MEMORY, keys=KEYS, apart=apart, engine={"quota": quota}) as server:
        assert [known(server, "alice", text)[0] for text in WARM] == [0] * 3
        flood(server, "bob")
        again = [known(server, "alice", text) for text in WARM]
        assert [cached for cached, _ in again] == [224 if apart else 0] * 3
        reasons = {why(server, "alice", id) for _, id in again}
        assert all(("had been dropped" in each) != apart for each in reasons), reasons
        found = figures(server)
        if apart:
            assert 'kvik_tenant_evicted_pages_total{tenant="1"}' not in found
            assert found['kvik_tenant_evicted_pages_total{tenant="2"}'] == found["kvik_evicted_pages_total"] > 1000
            assert found['kvik_tenant_cached_prompt_tokens_total{tenant="1"}'] == 3 * 224
            assert found['kvik_tenant_prompt_tokens_total{tenant="1"}'] == 6 * 225
            assert found.get("kvik_tenant_quota_bytes") == (None if quota is None else QUOTA)
        else:
            assert found['kvik_tenant_evicted_pages_total{tenant="all"}'] == found["kvik_evicted_pages_total"]


def test_why_tells_of_a_keys_own_rows_only(model):
    """bob's rows were dropped, for alice's: his reason says so, and nothing of it is counted as hers."""
    with serving(model, memory=MEMORY, keys=KEYS) as server:
        for number in range(12):
            known(server, "bob", f"{number:02}" * 120)
        first = known(server, "alice", "x" * 225)
        for number in range(3):
            known(server, "alice", f"{number:02}{number:02}y" * 45)
        assert figures(server)['kvik_tenant_evicted_pages_total{tenant="2"}'] > 0
        mine = known(server, "alice", "x" * 225)
        assert (first[0], mine[0]) == (0, 224)
        assert server.desk.records._kept[mine[1]].prompts[0].evicted == 0
        his = known(server, "bob", "00" * 120)
        assert his[0] < 224 and "had been dropped" in why(server, "bob", his[1])


def test_anothers_prompt_is_a_miss_in_time_and_in_counters(model, monkeypatch):
    """What the model computes for bob is what it computed for alice, and no figure of his moves with hers."""
    computed, run = [], Model.run

    def counted(self, chunks, *args, **options):
        computed.append([len(tokens) for _, tokens in chunks])
        return run(self, chunks, *args, **options)

    monkeypatch.setattr(Model, "run", counted)
    with serving(model, keys=KEYS) as server:
        work, answers = {}, {}
        for who, key in (("cold", "alice"), ("warm", "alice"), ("other", "bob")):
            computed.clear()
            answers[who] = complete(server, key, "secret " * 30)[1]
            work[who] = [sum(each) for each in computed]
        assert work["other"] == work["cold"] and sum(work["warm"]) < 32 < sum(work["cold"])
        assert answers["other"]["choices"] == answers["cold"]["choices"]
        assert answers["other"]["usage"] == answers["cold"]["usage"]
        found = figures(server)
        assert found['kvik_tenant_cached_prompt_tokens_total{tenant="2"}'] == 0
        assert found['kvik_tenant_prompt_tokens_total{tenant="2"}'] == 210
        assert "none of your earlier" in why(server, "bob", answers["other"]["id"])


def test_a_snapshot_adds_up_by_tenant_and_names_nobody(model):
    with serving(model, memory=MEMORY, keys=KEYS, engine={"quota": Quota(400_000, 2)}) as server:
        for key, text in (("alice", "a" * 225), ("bob", "b" * 100), ("bob", "c" * 100)):
            known(server, key, text)
        found = {key: server.send("/kvik/cache", key=key)[2] for key in ("alice", "bob")}
        assert [found[key].pop("tenant") for key in ("alice", "bob")] == ["1", "2"]
        assert found["alice"] == found["bob"]
        mine = found["bob"]["tenants"]
        assert {name: each["in_use_bytes"] for name, each in mine.items()} == {"1": 0, "2": 0}
        assert mine["1"]["kept_bytes"] * 6 == mine["2"]["kept_bytes"] * 7 > 0, "7 blocks, and 2 · 3"
        sizes = sum(sum(each.values()) for each in mine.values())
        free, tables = found["bob"]["free_bytes"], found["bob"]["table_bytes"]
        assert sizes + free + tables == found["bob"]["allocated_bytes"] and found["bob"]["quota_bytes"] == 400_000
        said = json.dumps(found["bob"]) + server.send("/metrics", key="bob")[2]
        for secret in ("alice", "bob", *(digest.hex()[:8] for digest in KEYS.digests)):
            assert secret not in said


def test_what_others_quotas_forbid_is_refused_with_both_numbers(model):
    with serving(model, memory=MEMORY, keys=KEYS, engine={"quota": Quota(1 << 19, 2)}) as server:
        status, answer = complete(server, "bob", "x" * 500, max_tokens=500)
        assert (status, answer["error"]["code"]) == (400, "cache_budget_exceeded")
        assert "take 1,048,576 bytes" in answer["error"]["message"]
        assert "other tenants' quotas leave of it is 589,824" in answer["error"]["message"]
        assert complete(server, "bob", "x" * 300)[0] == 200


def test_shared_prefixes_are_on_the_account_of_who_used_them_last(model):
    with serving(model, memory=MEMORY, keys=KEYS, share_prefixes=True) as server:
        assert [known(server, key, WARM[0])[0] for key in ("alice", "bob")] == [0, 224]
        assert set(server.send("/kvik/cache", key="bob")[2]["tenants"]) == {"2"}
        flood(server, "alice")
        assert known(server, "bob", WARM[0])[0] == 224


def test_labels_are_bounded():
    keys = Keys.of([f"key-{at}" for at in range(MOST + 9)])
    tenants = Tenants(keys, apart=True)
    names = [tenants.number(digest.hex()) for digest in keys.digests]
    assert names == [str(at) for at in range(1, MOST + 1)] + ["others"] * 9
    assert len({tenants.owner(digest.hex()) for digest in keys.digests}) == MOST + 9
    everybody = Tenants(keys, apart=False)
    assert {everybody.number(digest.hex()) for digest in keys.digests} == {"all"} == {tenants.number("")}
    assert {everybody.owner(hashlib.sha256(b"key-1").hexdigest())} == {""}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--tenant-quota", "lots", "--api-key", "a"], "lots"),
        (["--tenant-quota", "120%", "--api-key", "a"], "120%"),
        (["--tenant-quota", "1MiB"], "without API keys"),
        (["--tenant-quota", "60%", "--api-key", "a", "--api-key", "b", "--memory", "10MiB"], "5,242,880 is the most"),
    ],
)
def test_wrong_quotas_are_a_line_before_a_model_is_loaded(kvik_here, options, reason):
    done = kvik_here("serve", "/no/model/here", *options)
    assert done.returncode == 2 and reason in done.stderr and done.stderr.count("\n") == 1
