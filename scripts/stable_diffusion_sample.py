from guided_diffusion.commands.stable_diffusion_sample import main

if __name__ == "__main__":
    main()
