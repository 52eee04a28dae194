"""Origins and headers of model cards, and uploads, without the hub."""

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from layerskip.model.publish import (
    Origin,
    UploadError,
    card_header,
    check_upload,
    create_repository,
    origin_of,
    public_name,
    upload,
)


class StandInApi:
    """Records calls; `refusal` is raised by one of them."""

    endpoint = "https://hub.example"
    calls: list[tuple] = []  # noqa: RUF012
    is_private = True
    refusal: dict[str, Exception] = {}  # noqa: RUF012

    def _call(self, name, **arguments):
        self.calls.append((name, arguments))
        if name in self.refusal:
            raise self.refusal[name]

    def create_repo(self, repo_id, **arguments):
        self._call("create_repo", repo_id=repo_id, **arguments)

    def auth_check(self, repo_id, **arguments):
        self._call("auth_check", repo_id=repo_id, **arguments)

    def model_info(self, repo_id, **_):
        return huggingface_hub.ModelInfo(id=repo_id, private=self.is_private, tags=[], likes=0)

    def upload_folder(self, **arguments):
        self._call("upload_folder", **arguments)


@pytest.fixture
def api(monkeypatch):
    class Api(StandInApi):
        calls, refusal = [], {}

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return Api


def test_a_repository_is_created_and_checked_before_the_run(api):
    create_repository("me/mine", private=True)
    assert api.calls == [
        ("create_repo", {"repo_id": "me/mine", "private": True, "exist_ok": True}),
        ("auth_check", {"repo_id": "me/mine", "write": True}),
    ]


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("no token", "needs a token of the Hugging Face hub: set HF_TOKEN, or run hf auth login"),
        ("offline", "unset HF_HUB_OFFLINE"),
        ("no right", r"me/mine cannot be uploaded to: 403 Forbidden"),
        ("public", "exists and is public"),
    ],
)
def test_what_would_fail_after_the_run_is_refused_before_it(api, monkeypatch, trouble, message):
    if trouble == "no token":
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    elif trouble == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    elif trouble == "no right":
        api.refusal["auth_check"] = RuntimeError("403 Forbidden")
    else:
        api.is_private = False
    with pytest.raises(UploadError, match=message) as caught:
        create_repository("me/mine", private=True)
    assert "\n" not in str(caught.value)


def test_named_files_alone_are_uploaded(api, tmp_path):
    assert (
        upload(tmp_path, ["model.safetensors", "a[1]"], "me/mine") == "https://hub.example/me/mine"
    )
    ((_, arguments),) = api.calls
    for name, is_uploaded in (
        ("model.safetensors", True),
        ("a[1]/x.jinja", True),
        ("checkpoint-2/model.safetensors", False),
        ("train.json", False),
        ("a1", False),
    ):
        chosen = huggingface_hub.utils.filter_repo_objects(
            [name], allow_patterns=arguments["allow_patterns"]
        )
        assert bool([*chosen]) == is_uploaded, name


def test_a_failed_upload_names_the_result_and_the_way_on(api, tmp_path):
    api.refusal["upload_folder"] = ConnectionError("no route to host")
    with pytest.raises(UploadError, match=r"is whole, but .*\(no route to host\); --resume tries"):
        upload(tmp_path, ["README.md"], "me/mine")


def test_options_that_do_not_fit_are_refused():
    check_upload("me/mine", True)
    check_upload(None, False)
    for repo_id, private, message in (
        (None, True, "private needs push_to_hub"),
        ("mine", False, "'mine'; it must be ORG/NAME"),
        ("me/mine:Q4_K_M", False, "must be ORG/NAME"),
    ):
        with pytest.raises(ValueError, match=message):
            check_upload(repo_id, private)


def test_origins(tmp_path, api):
    smollm2 = Origin(hub_id="HuggingFaceTB/SmolLM2-135M-Instruct", license="apache-2.0")
    assert origin_of("smollm2-135m") == origin_of("smollm2-135m-topv2") == smollm2
    assert origin_of("some/model") == Origin(hub_id="some/model")
    assert origin_of(str(tmp_path)) == Origin()
    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: a/b\n---\n# Card\n")
    assert origin_of(str(tmp_path)) == Origin(hub_id="a/b", license="mit")
    (tmp_path / "README.md").write_text("---\nlicense: [mit\nbase_model: a/b\n---\n")
    assert origin_of(str(tmp_path)) == Origin()


def test_the_header_is_one_that_the_hub_reads(tmp_path):
    header = card_header(Origin(hub_id="a/b", license="mit"), tags=["x: y"], datasets=[])
    data = ModelCard(f"{header}\n# Card\n").data.to_dict()
    assert data == {"base_model": "a/b", "license": "mit", "tags": ["x: y"]}
    assert public_name(str(tmp_path)) == tmp_path.name
    assert public_name("org/data") == "org/data"
