"""Files of every format to what their rows mean, as text and chats."""
