from guided_diffusion.commands.noise_gain import main

if __name__ == "__main__":
    main()
