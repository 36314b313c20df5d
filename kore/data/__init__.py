"""Conversations and questions from files, and their encoding into model inputs."""

from __future__ import annotations

from kore.data.batches import ConversationBatches, conversation_batches, prompt_batches
from kore.data.encoder import Encoder
from kore.data.loading import load_conversations, load_questions
from kore.data.types import IMAGE_MARK, BadRow, Conversation, Conversations, Message, Question

__all__ = [
    "IMAGE_MARK",
    "BadRow",
    "Conversation",
    "ConversationBatches",
    "Conversations",
    "Encoder",
    "Message",
    "Question",
    "conversation_batches",
    "load_conversations",
    "load_questions",
    "prompt_batches",
]
