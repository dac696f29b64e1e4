"""Model families: networks written for one device, with what they are made of and their defaults."""
