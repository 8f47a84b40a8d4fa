from guided_diffusion.commands.train_emoji_features import main

if __name__ == "__main__":
    main()
