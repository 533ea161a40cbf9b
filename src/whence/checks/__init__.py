"""Checks: is an explanation true? They ask the model again and give a Verdict; they import no method."""
