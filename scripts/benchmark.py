from guided_diffusion.commands.benchmark import main

if __name__ == "__main__":
    main()
