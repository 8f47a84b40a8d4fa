from guided_diffusion.commands.disturbances import main

if __name__ == "__main__":
    main()
