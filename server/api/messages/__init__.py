"""Anthropic's Messages API on top of a `Conversation`."""

from server.api.messages.route import count_message_tokens, create_message

__all__ = ["count_message_tokens", "create_message"]
