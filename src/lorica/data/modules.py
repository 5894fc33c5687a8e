"""The package's data modules: what the rows of a data set mean, with what trains on them."""

from __future__ import annotations

from lorica.data.ag_news import AGNewsRows
from lorica.data.chat import ChatRows
from lorica.data.classification import ClassificationRows
from lorica.data.healthcare_qa import HealthcareQARows
from lorica.data.instruction import InstructionRows
from lorica.data.module import LoricaDataModule
from lorica.data.sentiment import SentimentRows


class ClassificationData(ClassificationRows, LoricaDataModule):
    """Labelled texts of anybody's as a model's batches."""


class InstructionData(InstructionRows, LoricaDataModule):
    """Prompts with written answers, of anybody's, as a model's batches."""


class ChatData(ChatRows, LoricaDataModule):
    """Conversations as a model's batches."""


class AGNewsData(AGNewsRows, LoricaDataModule):
    """AG News as a model's batches."""


class SentimentData(SentimentRows, LoricaDataModule):
    """Three-class sentiment as a model's batches."""


class HealthcareQAData(HealthcareQARows, LoricaDataModule):
    """Patients' questions with physicians' answers as a model's batches."""
