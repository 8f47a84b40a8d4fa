from guided_diffusion.commands.reproduce import main

if __name__ == "__main__":
    main()
