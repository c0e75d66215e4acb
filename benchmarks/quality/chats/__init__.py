"""Chats over long texts: what is put into a text or stands in it, and questions about it at known distances."""
