from guided_diffusion.commands.grain import main

if __name__ == "__main__":
    main()
