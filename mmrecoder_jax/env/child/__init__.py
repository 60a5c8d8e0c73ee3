"""What runs in the process of an untrusted script. The trainer imports nothing from here."""
