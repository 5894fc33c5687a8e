"""Patients' questions with physicians' answers: instruction, input, output."""

from __future__ import annotations

from typing import ClassVar

from lorica.data.instruction import InstructionRows


class HealthcareQARows(InstructionRows):
    """`data=healthcare_qa`. The answers are data to learn from, not medical advice."""

    sample_name: ClassVar[str] = "healthcare_qa"
