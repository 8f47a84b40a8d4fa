from guided_diffusion.commands.inspect_checkpoint import main

if __name__ == "__main__":
    main()
