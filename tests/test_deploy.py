"""The examples of deployment: files that parse, keys and extras that exist, streams that no proxy holds back."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from configs import annotate, serve

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "docs" / "deploy"
NGINX = (DEPLOY / "nginx.conf").read_text()
DOCKERFILE = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["paligemma"]
UNIT = (DEPLOY / "paligemma.service").read_text()
[RAY_JOB] = [
    yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/annotate.md").read_text(), re.S)
]


def seconds(text: str, pattern: str) -> float:
    return float(re.search(pattern, text)[1])


@pytest.mark.parametrize(
    "text, config",
    [
        (DOCKERFILE, serve.get_config()),
        (" ".join(COMPOSE["command"]), serve.get_config()),
        (UNIT, serve.get_config()),
        (NGINX, serve.get_config()),
        (RAY_JOB["spec"]["entrypoint"], annotate.get_config()),
    ],
    ids=["Dockerfile", "compose", "systemd", "nginx", "KubeRay"],
)
def test_keys_exist(text, config):
    keys = re.findall(r"--config\.(\w+)=", text)
    assert keys and set(keys) <= set(config)


def test_the_image_has_what_it_copies_and_installs():
    copied = [name for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.M) for name in line.split()[:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {project["project"]["readme"], *project["tool"]["setuptools"]["dynamic"]["dependencies"]["file"]}
    assert needed | {"main.py", "paligemma_jax", "configs", "assets"} <= set(copied)
    lists = re.findall(r"EXTRAS=(\S+)", DOCKERFILE)
    extras = {name for each in lists for name in each.split(",")}
    assert len(lists) == 2 and extras <= set(project["project"]["optional-dependencies"])
    arguments = set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.M))
    assert arguments == {"JAX", "EXTRAS"} and all(f"${name}" in DOCKERFILE for name in arguments)


def test_compose_gives_the_container_what_its_image_expects():
    build = COMPOSE["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT and (ROOT / build["dockerfile"]).is_file()
    [secret] = COMPOSE["secrets"]
    assert f"--config.api_key_file=/run/secrets/{secret}" in DOCKERFILE
    [volume] = [each.split(":")[1] for each in COMPOSE["volumes"]]
    assert f"VOLUME {volume}\n" in DOCKERFILE and f"XDG_CACHE_HOME={volume} " in DOCKERFILE
    assert all(port.startswith("127.0.0.1:") for port in COMPOSE["ports"])


def test_limits_of_time_are_longer_than_the_servers():
    config = serve.get_config()
    assert seconds(COMPOSE["stop_grace_period"], r"(\d+)s") > config.drain_s
    assert seconds(UNIT, r"TimeoutStopSec=(\d+)") > config.drain_s
    assert seconds(NGINX, r"proxy_read_timeout (\d+)s;") > config.request_timeout_s
    assert seconds(NGINX, r"client_max_body_size (\d+)m;") * 2**20 == config.max_body_bytes


def test_the_proxy_holds_nothing_back():
    [_, root, *_] = re.split(r"^location ", NGINX, flags=re.M)
    assert "proxy_buffering off;" in root and "client_header_timeout" not in root  # of a server block only
    assert f"proxy_pass http://127.0.0.1:{serve.get_config().port};" in root


def test_the_unit_starts_the_server_in_its_clone():
    directory = re.search(r"^WorkingDirectory=(.*)$", UNIT, re.M)[1]
    command = re.search(r"^ExecStart=((?:.*\\\n)*.*)$", UNIT, re.M)[1].replace("\\\n", " ").split()
    assert command[0].startswith(directory) and command[1] == "main.py"
    assert (ROOT / command[2].removeprefix("--config=")).is_file()
    assert "LoadCredential=key:" in UNIT and "--config.api_key_file=%d/key" in command


def test_the_cluster_of_the_documentation_is_whole():
    cluster = RAY_JOB["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert RAY_JOB["kind"] == "RayJob" and len(groups) == 2
    for group in groups:
        pod = group["template"]["spec"]
        assert {each["name"] for each in pod["volumes"]} == {"shared"}
        [container] = pod["containers"]
        assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/shared"}]
    assert "--config.engine=ray" in RAY_JOB["spec"]["entrypoint"]


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_nginx_reads_its_file(tmp_path):
    places = " ".join(f"{name}_temp_path {tmp_path};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    server = f"server {{ listen unix:{tmp_path}/sock; include {DEPLOY / 'nginx.conf'}; }}"
    whole = f"pid {tmp_path}/pid; error_log stderr; events {{}} http {{ access_log off; {places} {server} }}"
    (tmp_path / "nginx.conf").write_text(whole)
    done = subprocess.run(["nginx", "-t", "-q", "-p", tmp_path, "-c", tmp_path / "nginx.conf"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
