"""The engine over HTTP, in OpenAI's form, and the page."""
