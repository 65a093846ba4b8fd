"""Checks fastrnn._cuda in a folder of installed packages, on a machine without a GPU.

It must load, find no device in plain words, depend on neither CUDA's libraries nor torch's, and the
layers beside it must run on the CPU.
"""

import re
import subprocess
import sys
from pathlib import Path

folder = sys.argv[1]
(library,) = Path(folder).glob("fastrnn/_cuda.*.so")

dynamic = subprocess.run(
    ["readelf", "--dynamic", library], check=True, capture_output=True, text=True
).stdout
needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
allowed = r"lib(stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so.*|ld-linux.*"
foreign = [name for name in needed if not re.fullmatch(allowed, name)]
assert needed, dynamic
assert not foreign, f"{library.name} needs {foreign}"

sys.path.insert(0, folder)
import torch  # noqa: E402

import fastrnn  # noqa: E402
from fastrnn import _cuda  # noqa: E402

assert Path(fastrnn.__file__).is_relative_to(Path(folder).resolve()), fastrnn.__file__
if not torch.cuda.is_available():
    try:
        _cuda.device_info(0)
    except RuntimeError as error:
        print(f"Without a GPU: {error}")
    else:
        raise AssertionError("device_info found a device that torch does not")
x = torch.randn(3, 2, 4)
ours, theirs = fastrnn.LSTM(4, 5), torch.nn.LSTM(4, 5)
ours.load_state_dict(theirs.state_dict())
torch.testing.assert_close(ours(x)[0], theirs(x)[0])
print(f"{library.name}: {library.stat().st_size / 2**20:.1f} MiB; needs {', '.join(needed)}")
