from guided_diffusion.commands.make_emoji_data import main

if __name__ == "__main__":
    main()
