"""Detection of the processor, from texts of other machines."""

import pytest

from layerskip.model import hardware as machine

ZEN_4 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
stepping\t: 1
microcode\t: 0xa101148
flags\t\t: fpu vme avx512_bf16
vmx flags\t: vnmi
processor\t: 1
cpu family\t: 26
model\t\t: 2
"""
NAME_FIRST = """model name\t: AMD EPYC
cpu family\t: 26
model\t\t: 2
stepping\t: unknown
"""
ARM = """processor\t: 0
CPU implementer\t: 0x41
CPU architecture: 8
CPU part\t: 0xd0c
CPU revision\t: 1
"""
POWER = """cpu\t\t: POWER9
model\t\t: 8335-GTH
"""
CACHED = (machine._cpu_line, machine.cpu_name, machine.machine)


@pytest.fixture
def tells(tmp_path, monkeypatch):
    """Sets what /proc/cpuinfo says; None: there is none."""

    def told(text):
        file = tmp_path / "cpuinfo"
        if text is not None:
            file.write_text(text)
        monkeypatch.setattr(machine, "_CPU_INFO", file)
        forget()

    def forget():
        for cached in CACHED:
            cached.cache_clear()

    yield told
    forget()


def test_family_model_and_stepping_where_they_are_known(tells):
    for text, model in (
        (ZEN_4, "family 25, model 17, stepping 1"),
        (NAME_FIRST, "family 26, model 2"),
        (ARM, ""),
        (POWER, ""),
        ("", ""),
        (None, ""),  # macOS, Windows
    ):
        tells(text)
        assert machine.cpu_model() == model


def test_the_name_is_without_them(tells, monkeypatch):
    for text, name in ((ZEN_4, "AMD EPYC"), (ARM, "ARM 0x41 0xd0c")):
        monkeypatch.setattr(machine.sys, "platform", "linux")
        tells(text)
        assert machine.cpu_name() == name
