import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the files here share digits_net.py
