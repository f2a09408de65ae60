"""Storages: what is written is what Optuna writes."""

import sqlite3

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from compressor.search.storage import open_storage, shared_once

SPACE = {
    "scale": FloatDistribution(1e-3, 1e3, log=True),
    "shift": FloatDistribution(-1.0, 1.0),
    "width": IntDistribution(8, 64, step=8),
    "form": CategoricalDistribution(["svd", None, 2]),
}


def test_a_trial_written_in_one_statement_is_the_one_optuna_writes(tmp_path):
    drawn = [{"scale": 2.5, "shift": -0.25, "width": 24, "form": None}, {"scale": 1.0, "shift": 1.0, "width": 64, "form": "svd"}]
    peer = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'peer.db'}")
    storages = {"peer": optuna.storages.get_storage(peer), "own": open_storage(f"sqlite:///{tmp_path / 'own.db'}")}
    found, tables = {}, {}
    for name, storage in storages.items():
        study = optuna.create_study(storage=storage, study_name="s")
        templates = [
            create_trial(
                state=TrialState.RUNNING, params=params, distributions=SPACE, system_attrs={"k": 1}, user_attrs={"who": "me"}
            )
            for params in drawn
        ]
        for template in templates:
            storage.create_new_trial(study._study_id, template)
            assert list(template.params) == list(SPACE)  # left as it was given
        study.tell(1, 0.5)
        found[name] = [(t.number, t.params, t.distributions, t.state, t.value, t.user_attrs, t.system_attrs) for t in study.trials]
        with sqlite3.connect(tmp_path / f"{name}.db") as connection:
            tables[name] = connection.execute("select * from trial_params order by param_id").fetchall()
    assert found["own"] == found["peer"]
    assert [t[1] for t in found["own"]] == drawn
    assert tables["own"] == tables["peer"]


def test_names_of_facts_fit_into_the_columns_of_database_servers(tmp_path):
    """PostgreSQL and MySQL keep 512 characters, which SQLite does not look at."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    keys = ["ranks of " + "256x256x3x3 " * 60 + end for end in ("a", "b")]
    for key in keys:
        assert shared_once(url, "facts", key, lambda key=key: {"key": key}) == {"key": key}
    assert [shared_once(url, "facts", key, dict)["key"] for key in keys] == keys
    assert max(map(len, optuna.load_study(study_name="facts", storage=url).user_attrs)) <= 512
