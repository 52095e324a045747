"""Pipelines to read and to run."""

import yaml


def pipeline(tmp_path, stages, variables=None):
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"vars": variables or {}, "stages": stages}))
    return str(path)


def counting(tmp_path, name="count", fail=False):
    """A stage that notes each of its runs in a file."""
    code = f"open(r'{tmp_path}/{name}.runs','a').write('x')" + ("; raise SystemExit(3)" if fail else "")
    return {"name": name, "run": ["python", "-c", code]}


def runs(tmp_path, name="count"):
    return (tmp_path / f"{name}.runs").read_text()
