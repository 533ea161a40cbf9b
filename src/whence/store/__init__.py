"""Store: indexes of training examples on disk or in an object store. Plain bytes in, checked bytes out; no torch."""

from .contents import Manifest
from .index import Index

__all__ = ["Index", "Manifest"]
