"""Use a trained model: open it with its trunk and adapters, measure it, and serve it in the form of OpenAI's API."""
