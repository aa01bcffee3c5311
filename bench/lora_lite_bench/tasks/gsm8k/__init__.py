"""`gsm8k`: MetaMathQA for training, GSM8K for validation and test, answers generated and compared exactly."""

from .task import Gsm8k

__all__ = ["Gsm8k"]
